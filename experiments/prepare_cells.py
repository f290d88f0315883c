"""One small file of real cells that the long runs read, for machines that have neither ../shared nor anndata.

    python -m experiments.prepare_cells --out runs/cells.npz         # 133 mouse embryo cells, some 3.3 MB

Holds out whole embryos for validation, since cells of one embryo resemble each other more than cells of two,
and keeps the genes that most of the training cells express.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.cells import Cells, read_cells
from experiments.command_line import experiment_parser, fail, positive_int

DEFAULT_DATA = Path("../shared/cells/deng_mouse_embryo.h5ad")
# With these, 12 blocks of width 1,024 and the embeddings of either task stay below 162 million parameters.
NUM_GENES = 10_240
VALIDATION_FRACTION = 0.2


def commonest_genes(cells: Cells, is_validation: NDArray[np.bool_], num_genes: int) -> Cells:
    """The cells with the genes that most of the training cells express, in their old order.

    Args:
        cells: Cells of any number of genes.
        is_validation: [cells], the cells that have no say.
        num_genes: How many are kept at most; of equally common genes the first ones.

    Returns:
        The cells.

    Raises:
        ValueError: A cell expresses none of the genes kept.
    """
    training = cells.expression[~is_validation]
    num_expressing = np.bincount(training.indices, minlength=len(cells.genes))
    kept = np.sort(np.argsort(-num_expressing, kind="stable")[:num_genes])
    expression = cells.expression[:, kept]
    if num_empty := int((np.diff(expression.indptr) == 0).sum()):
        raise ValueError(
            f"Expected every cell to express one of the {len(kept)} commonest genes; {num_empty} express "
            "none. Keep more genes."
        )
    return replace(cells, expression=expression, genes=cells.genes[kept])


def embryos(names: NDArray[np.str_]) -> NDArray[np.str_]:
    """Which embryo each cell is of, from names such as GSM1112611_earlyblast_2.16_expression.

    Args:
        names: [cells] names of the cells; one of another form stands for a group of its own.

    Returns:
        [cells] names of the embryos.

    Example:
        >>> embryos(np.array(["GSM1112611_earlyblast_2.16_expression", "cell 7"])).tolist()
        ['earlyblast_2', 'cell 7']
    """
    return np.array([re.sub(r"^GSM\d+_|\.\d+_expression$", "", name) for name in names])


def held_out(groups: NDArray[np.str_], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which cells are for validation: whole groups in random order, each that the share has room for.

    Args:
        groups: [cells], the group of each cell; none is on both sides.
        fraction: Share of the cells held out at most; but for two cells, the least that is held out.
        seed: Equal seeds hold out equal cells.

    Returns:
        [cells] bool.

    Raises:
        ValueError: No choice of groups leaves two cells on either side.

    Example:
        >>> held_out(np.array(["a", "a", "b", "c", "c", "c"]), 0.4, seed=0).tolist()
        [True, True, False, False, False, False]
    """
    room = max(2, round(fraction * len(groups)))
    names, sizes = np.unique(groups, return_counts=True)
    chosen: list[str] = []
    for i in np.random.default_rng(seed).permutation(len(names)):
        if sizes[i] <= room:
            chosen.append(names[i])
            room -= int(sizes[i])
    is_validation = np.isin(groups, chosen)
    if min(is_validation.sum(), (~is_validation).sum()) < 2:
        raise ValueError(
            f"Expected groups of cells that leave two on either side; {len(names)} groups of {len(groups)} "
            f"cells with a share of {fraction:g} held out do not."
        )
    return is_validation


def write_prepared(path: Path, cells: Cells, is_validation: NDArray[np.bool_]) -> None:
    """Write what `experiments.cell_pool.real_pool` reads.

    Args:
        path: An .npz file; its folder is made.
        cells: The cells.
        is_validation: [cells] bool, which are held out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    expression = cells.expression
    with path.open("wb") as file:  # numpy would append .npz to another name
        np.savez_compressed(
            file,
            values=expression.data,
            genes_of_values=expression.indices.astype(np.uint16 if len(cells.genes) < 2**16 else np.uint32),
            starts=expression.indptr.astype(np.int64),
            genes=cells.genes.astype(str),
            is_validation=is_validation,
            source=np.array(cells.source),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("prepare_cells", __doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"default {DEFAULT_DATA}")
    parser.add_argument("--genes", type=positive_int, default=NUM_GENES, help=f"default {NUM_GENES}")
    parser.add_argument("--seed", type=int, default=0, help="decides which embryos are held out")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = parser.parse_args(arguments)
    try:
        cells = read_cells(options.data)
        assert cells.names is not None  # files name their cells
        groups = embryos(cells.names)
        is_validation = held_out(groups, VALIDATION_FRACTION, options.seed)
        cells = commonest_genes(cells, is_validation, options.genes)
        write_prepared(options.out, cells, is_validation)
    except (OSError, ValueError, ImportError) as error:
        return fail("prepare_cells", error)
    print(
        f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {len(cells)} cells of "
        f"{cells.source}, {is_validation.sum()} held out ({', '.join(np.unique(groups[is_validation]))}), "
        f"{len(cells.genes)} genes."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
