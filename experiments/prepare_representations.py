"""One file with all labelled cells, their split and the baseline, for machines that have no anndata.

    python -m experiments.prepare_representations --out runs/representations.npz
    python -m experiments.prepare_representations --datasets pbmc3k_human_blood --out runs/pbmc.npz
    python -m experiments.prepare_representations --data cells.h5ad --label cell_type --group donor

The baseline is what one would do without a model: log-normalised expression of the genes that vary most among
training cells, projected onto the training cells' first principal components.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.cell_splits import CellSplit, split_cells
from experiments.cells import Cells, read_cells
from experiments.command_line import experiment_parser, fail
from experiments.representation_data import (
    DATASETS,
    FOLDER,
    Dataset,
    PreparedCells,
    check_files,
    write_prepared,
)

DEFAULT_OUT = Path("runs/representations.npz")
PCA_COMPONENTS, PCA_GENES = 50, 2000
SPLIT_SEED = 0


def prepare(dataset: Dataset) -> PreparedCells:
    """Read, split, and embed the held-out cells by the baseline; cells without a type are left out.

    Args:
        dataset: What to read.

    Returns:
        The data set, ready for training.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be used, lacks a column, or has cells without a group.
    """
    check_files([dataset])
    cells = read_cells(dataset.file, label_column=dataset.label)
    groups = None
    if dataset.group is not None:
        groups = read_cells(dataset.file, label_column=dataset.group).labels
    cells, groups = _with_types(dataset, cells, groups)
    assert cells.labels is not None
    split = split_cells(cells.labels, groups, seed=SPLIT_SEED)
    if dataset.group is not None:
        split = replace(split, rule=f"{split.rule} ({dataset.group})")
    return PreparedCells(cells, split, pca_embeddings(cells, split), dataset.is_control, groups)


def _with_types(
    dataset: Dataset, cells: Cells, groups: NDArray[np.str_] | None
) -> tuple[Cells, NDArray[np.str_] | None]:
    """The cells that have a type, and their groups."""
    assert cells.labels is not None
    is_kept = cells.labels != ""
    if not is_kept.all():
        print(f"{dataset.name}: {(~is_kept).sum()} cells without {dataset.label} are left out.")
        cells = Cells(cells.expression[is_kept], cells.genes, cells.labels[is_kept], cells.source)
        groups = None if groups is None else groups[is_kept]
    if groups is not None and (groups == "").any():
        raise ValueError(
            f"Expected a {dataset.group} of every cell in {dataset.file}; {(groups == '').sum()} have none. "
            "Leave --group out, or give a column without gaps."
        )
    return cells, groups


def pca_embeddings(cells: Cells, split: CellSplit) -> NDArray[np.float32]:
    """Held-out cells on the principal components of the training cells.

    Args:
        cells: All cells.
        split: Variances, means and components are those of the cells that train.

    Returns:
        [held-out cells, components]; at most `PCA_COMPONENTS`.
    """
    from sklearn.decomposition import PCA

    train = cells.expression[split.is_train]
    mean = np.asarray(train.mean(axis=0)).ravel()
    variance = np.asarray(train.multiply(train).mean(axis=0)).ravel() - mean**2
    genes = np.sort(np.argsort(-variance, kind="stable")[:PCA_GENES])
    dense = train[:, genes].toarray()
    pca = PCA(min(PCA_COMPONENTS, *dense.shape), svd_solver="full").fit(dense)
    return pca.transform(cells.expression[split.is_test][:, genes].toarray()).astype(np.float32)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which cells are meant; `chosen_datasets` reads them."""
    add = parser.add_argument
    add("--datasets", nargs="+", metavar="NAME", help=f"of those in {FOLDER} (default: all seven)")
    add("--data", type=Path, help="any .h5ad file with labelled cells, in place of those")
    add("--label", default="cell_type", help="column of --data with the types (default cell_type)")
    add("--group", help="column of --data with donors or batches: none is on both sides of the split")


def chosen_datasets(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Dataset]:
    """What `add_data_flags` were given.

    Args:
        parser: Ends the program with status 2 for names there are not.
        options: Of the parser.

    Returns:
        The data sets.
    """
    if options.data is not None:
        return [Dataset(f"{options.data.stem}-{options.label}", options.data, options.label, options.group)]
    names = options.datasets or list(DATASETS)
    if unknown := set(names) - DATASETS.keys():
        parser.error(f"there are no data sets {sorted(unknown)}; there are {', '.join(DATASETS)}")
    return [DATASETS[name] for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("prepare_representations", __doc__)
    add_data_flags(parser)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    options = parser.parse_args(arguments)
    datasets = chosen_datasets(parser, options)
    prepared = {}
    try:
        check_files(datasets)
        for dataset in datasets:
            prepared[dataset.name] = each = prepare(dataset)
            split = each.split
            print(
                f"{dataset.name}: {split.is_train.sum()} cells train, {split.is_validation.sum()} choose, "
                f"{split.is_test.sum()} are held out ({split.rule}); {len(each.cells.genes)} genes."
            )
        write_prepared(options.out, prepared)
    except (OSError, ValueError, ImportError) as error:
        return fail("prepare_representations", error)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
