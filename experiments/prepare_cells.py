"""One small file of real cells that the long runs read, for machines that have neither ../shared nor anndata.

    python -m experiments.prepare_cells --out runs/cells.npz         # 133 mouse embryo cells, some 4 MB

Keeps the genes that most cells express and marks the cells that are held out for validation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.cells import Cells, read_cells
from experiments.command_line import experiment_parser, positive_int

DEFAULT_DATA = Path("../shared/cells/deng_mouse_embryo.h5ad")
# With these, 12 blocks of width 1,024 and the embeddings of either task stay below 162 million parameters.
NUM_GENES = 10_240
VALIDATION_FRACTION = 0.2


def commonest_genes(cells: Cells, num_genes: int) -> Cells:
    """The cells with the genes that most of them express, in their old order.

    Args:
        cells: Cells of any number of genes.
        num_genes: How many are kept at most; of equally common genes the first ones.

    Returns:
        The cells, without those that express none of the genes kept.
    """
    num_expressing = np.bincount(cells.expression.indices, minlength=len(cells.genes))
    kept = np.sort(np.argsort(-num_expressing, kind="stable")[:num_genes])
    expression = cells.expression[:, kept]
    is_expressing = np.diff(expression.indptr) > 0
    labels = None if cells.labels is None else cells.labels[is_expressing]
    return Cells(expression[is_expressing], cells.genes[kept], labels, cells.source)


def held_out(num_cells: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which cells are for validation.

    Args:
        num_cells: At least 4, so that two cells are on either side.
        fraction: Share of the cells held out; two at least, and two are left.
        seed: Equal seeds hold out equal cells.

    Returns:
        [num_cells] bool.

    Raises:
        ValueError: There are fewer than 4 cells.

    Example:
        >>> int(held_out(10, 0.2, seed=0).sum())
        2
    """
    if num_cells < 4:
        raise ValueError(f"Expected at least 4 cells to hold some out; got {num_cells}.")
    count = min(max(2, round(fraction * num_cells)), num_cells - 2)
    chosen = np.random.default_rng(seed).permutation(num_cells)[:count]
    return np.isin(np.arange(num_cells), chosen)


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
    """Write the file.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        Exit status: 0, 2 for input that cannot be used.
    """
    parser = experiment_parser("prepare_cells", __doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"default {DEFAULT_DATA}")
    parser.add_argument("--genes", type=positive_int, default=NUM_GENES, help=f"default {NUM_GENES}")
    parser.add_argument("--seed", type=int, default=0, help="decides which cells are held out")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = parser.parse_args(arguments)
    try:
        cells = commonest_genes(read_cells(options.data), options.genes)
        is_validation = held_out(len(cells), VALIDATION_FRACTION, options.seed)
        write_prepared(options.out, cells, is_validation)
    except (OSError, ValueError, ImportError) as error:
        print(f"prepare_cells: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {len(cells)} cells of "
        f"{cells.source}, {is_validation.sum()} held out, {len(cells.genes)} genes."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
