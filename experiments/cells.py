"""Single cells as log1p expression matrices: read from .h5ad files, or synthesised with known cell types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

COUNTS_PER_CELL = 10_000
# log1p of a whole cell's 10,000 counts in one gene is 9.2, of a million 13.8: nothing logged lies above.
_LARGEST_LOG_VALUE = 20.0
_INSTALL = 'install it with `pip install "stability-probes[cells]"`'


@dataclass(frozen=True)
class Cells:
    """Expression of some cells.

    Attributes:
        expression: CSR float32 [cells, genes], log1p of counts per 10,000, no explicit zeros; every cell
            expresses at least one gene.
        genes: Gene names, one per column.
        labels: Cell type of each cell, empty where the file has none; None where none were asked for.
        source: Where the cells come from, for reports.
        names: Name of each cell in its file, or None where it has none.
    """

    expression: sparse.csr_matrix
    genes: NDArray[np.str_]
    labels: NDArray[np.str_] | None
    source: str
    names: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return self.expression.shape[0]


def read_cells(path: str | Path, *, label_column: str | None = None) -> Cells:
    """Cells of any .h5ad file, counts or logged.

    `.raw` is read where the file has one (`.X` is then usually scaled), `.X` otherwise. The values are
    taken for counts if all are whole numbers or any exceeds 20, and then scaled to 10,000 per cell and
    logged; otherwise they are taken for logged values and left alone. Cells without any expressed gene are
    dropped.

    Args:
        path: An AnnData file.
        label_column: Column of `.obs` with the cell types; None reads no labels.

    Returns:
        The cells.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no .h5ad file or cannot be read, holds no cells, negative or non-finite
            values, or lacks the label column.
        ImportError: anndata is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected an .h5ad file; there is none at {path}.")
    if path.suffix != ".h5ad":
        raise ValueError(f"Expected an .h5ad file; got {path.name}. Convert it with anndata's write_h5ad.")
    try:
        import anndata
    except ImportError as error:
        raise ImportError(f"Reading {path.name} needs anndata; {_INSTALL}.") from error
    try:
        data = anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many types; each means the same to the caller
        raise ValueError(f"{path.name} could not be read as an .h5ad file: {error}") from error
    return _from_anndata(data, label_column, source=path.name)


def pbmc68k(*, label_column: str | None = None) -> Cells:
    """700 real human blood cells, 765 genes: `scanpy.datasets.pbmc68k_reduced()`, which needs no network.

    Args:
        label_column: "bulk_labels" gives the cell types; None reads no labels.

    Returns:
        The cells, logged already (183 to 409 expressed genes each).

    Raises:
        ImportError: scanpy is not installed.

    Source:
        Zheng et al., Nature Communications 8:14049 (2017).
    """
    try:
        import scanpy
    except ImportError as error:
        raise ImportError(f"The default cells come with scanpy; {_INSTALL}.") from error
    return _from_anndata(scanpy.datasets.pbmc68k_reduced(), label_column, source="pbmc68k_reduced (scanpy)")


def synthetic_cells(
    *,
    num_cells: int = 256,
    num_genes: int = 10_000,
    num_types: int = 8,
    counts_per_cell: int = 400_000,
    seed: int = 0,
) -> Cells:
    """Cells of known types, for lengths that real data lack.

    Every type switches on one programme of num_genes / num_types genes, e times its base rate; every cell
    runs its programme at its own strength. Counts are Poisson: rate_cg ∝ base_g · exp(strength_c) inside
    the programme of the cell's type and base_g outside, with log-normal base rates. So a hidden value can
    be predicted from the gene, better from the cell's type, and best from the strength that the other
    genes of the programme show.

    Args:
        num_cells: Number of cells.
        num_genes: Number of genes, at least num_types.
        num_types: Number of cell types, all equally frequent.
        counts_per_cell: Expected molecules of a cell; the default lets a cell express nine genes in ten.
        seed: Equal seeds give equal cells.

    Returns:
        The cells; labels are "type 0", "type 1", ...

    Raises:
        ValueError: A size is below 1, or there are more types than genes.

    Source:
        Own construction; Poisson counts around log-normal rates are the usual model of droplet data.

    Example:
        >>> cells = synthetic_cells(num_cells=4, num_genes=20, num_types=2, counts_per_cell=200)
        >>> cells.expression.shape, cells.labels.tolist()
        ((4, 20), ['type 0', 'type 1', 'type 0', 'type 1'])
    """
    sizes = {
        "num_cells": num_cells,
        "num_types": num_types,
        "counts_per_cell": counts_per_cell,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")
    if num_genes < num_types:
        raise ValueError(f"`num_genes` must be at least `num_types`; got {num_genes} and {num_types}.")
    generator = np.random.default_rng(seed)
    base = generator.lognormal(sigma=1.5, size=num_genes)
    programme_of_gene = generator.permutation(num_genes) % num_types
    type_of_cell = np.arange(num_cells) % num_types
    strength = generator.normal(loc=1.0, scale=0.5, size=num_cells)
    in_programme = programme_of_gene == type_of_cell[:, None]
    rate = base * np.exp(strength[:, None] * in_programme)
    counts = generator.poisson(counts_per_cell * rate / rate.sum(axis=1, keepdims=True))
    return Cells(
        expression=_log_counts(sparse.csr_matrix(counts, dtype=np.float64)),
        genes=np.array([f"gene {i}" for i in range(num_genes)]),
        labels=np.array([f"type {i}" for i in type_of_cell]),
        source=f"synthetic (seed {seed}, {num_types} types)",
    )


def _from_anndata(data: AnnData, label_column: str | None, source: str) -> Cells:
    matrix: Any = data.X if data.raw is None else data.raw.X
    names = data.var_names if data.raw is None else data.raw.var_names
    if matrix is None or 0 in matrix.shape:
        raise ValueError(f"Expected cells and genes in {source}; got an empty matrix.")
    expression = sparse.csr_matrix(matrix, dtype=np.float64)
    expression.eliminate_zeros()
    values = expression.data
    if not np.isfinite(values).all():
        raise ValueError(f"Expected finite values in {source}; found NaN or infinity.")
    if (values < 0).any():
        raise ValueError(
            f"Expected counts or logged counts in {source}; the least value is {values.min():.3g}. "
            "Scaled expression has no zero: save the counts in .raw or .X."
        )
    is_expressing = np.diff(expression.indptr) > 0
    if not is_expressing.any():
        raise ValueError(f"Expected at least one cell with an expressed gene in {source}; found none.")
    labels = None
    if label_column is not None:
        if label_column not in data.obs:
            raise ValueError(
                f"{source} has no label column {label_column!r}; its columns are {list(data.obs.columns)}."
            )
        column = data.obs[label_column]
        # A missing value would become a type of the name "nan".
        labels = np.where(column.isna(), "", column.astype(str)).astype(str)[is_expressing]
    is_counts = (values == np.round(values)).all() or values.max() > _LARGEST_LOG_VALUE
    expression = expression[is_expressing]
    return Cells(
        expression=_log_counts(expression) if is_counts else expression.astype(np.float32),
        genes=names.to_numpy().astype(str),
        labels=labels,
        source=source,
        names=data.obs_names.to_numpy().astype(str)[is_expressing],
    )


def _log_counts(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """log1p of counts per 10,000; cells without counts stay zero."""
    totals = np.maximum(counts.sum(axis=1).A1, 1)
    scaled = sparse.diags(COUNTS_PER_CELL / totals) @ counts
    return sparse.csr_matrix(scaled.log1p(), dtype=np.float32)
