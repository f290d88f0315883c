from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from experiments.cells import pbmc68k, read_cells, synthetic_cells

anndata = pytest.importorskip("anndata", reason='needs `pip install "stability-probes[cells]"`')

REAL_CELLS = Path(__file__).parents[3] / "shared" / "cells"

COUNTS = np.array([[3.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 5.0, 5.0]])


def write(path: Path, matrix: np.ndarray, *, raw: np.ndarray | None = None) -> Path:
    data = anndata.AnnData(sparse.csr_matrix(matrix.astype(np.float32)))
    data.obs["kind"] = [f"kind {i}" for i in range(len(matrix))]
    if raw is not None:
        data.raw = anndata.AnnData(sparse.csr_matrix(raw.astype(np.float32)))
    data.write_h5ad(path)
    return path


def test_counts_are_scaled_and_logged_and_empty_cells_dropped(tmp_path):
    cells = read_cells(write(tmp_path / "counts.h5ad", COUNTS), label_column="kind")
    expected = np.log1p([[7500, 0, 2500], [0, 5000, 5000]])
    np.testing.assert_allclose(cells.expression.toarray(), expected, rtol=1e-6)
    assert cells.expression.dtype == np.float32
    assert cells.labels.tolist() == ["kind 0", "kind 2"]


def test_logged_values_are_left_alone(tmp_path):
    logged = np.log1p(COUNTS)
    cells = read_cells(write(tmp_path / "logged.h5ad", logged))
    np.testing.assert_allclose(cells.expression.toarray(), logged[[0, 2]], rtol=1e-6)
    assert cells.labels is None


def test_fractional_values_too_large_for_logarithms_are_counts(tmp_path):
    estimated = np.array([[30.5, 69.5, 0.0]])
    cells = read_cells(write(tmp_path / "estimated.h5ad", estimated))
    np.testing.assert_allclose(cells.expression.toarray(), np.log1p([[3050, 6950, 0]]), rtol=1e-6)


def test_raw_goes_before_x(tmp_path):
    scaled = COUNTS - COUNTS.mean(axis=0)
    cells = read_cells(write(tmp_path / "scaled.h5ad", scaled, raw=np.log1p(COUNTS)))
    np.testing.assert_allclose(cells.expression.toarray(), np.log1p(COUNTS)[[0, 2]], rtol=1e-6)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none at"):
        read_cells(tmp_path / "absent.h5ad")


def test_other_file_type(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("gene,value\n")
    with pytest.raises(ValueError, match=r"Expected an \.h5ad file; got cells\.csv"):
        read_cells(path)


def test_unreadable_file(tmp_path):
    path = tmp_path / "broken.h5ad"
    path.write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match=r"broken\.h5ad could not be read as an \.h5ad file"):
        read_cells(path)


def test_missing_label_column_names_those_present(tmp_path):
    with pytest.raises(ValueError, match=r"no label column 'cell_type'; its columns are \['kind'\]"):
        read_cells(write(tmp_path / "cells.h5ad", COUNTS), label_column="cell_type")


def test_no_cells(tmp_path):
    with pytest.raises(ValueError, match="got an empty matrix"):
        read_cells(write(tmp_path / "empty.h5ad", np.zeros((0, 3))))


def test_no_expressed_gene(tmp_path):
    with pytest.raises(ValueError, match="at least one cell with an expressed gene"):
        read_cells(write(tmp_path / "silent.h5ad", np.zeros((2, 3))))


def test_negative_values(tmp_path):
    with pytest.raises(ValueError, match="the least value is -1"):
        read_cells(write(tmp_path / "scaled.h5ad", np.array([[1.5, -1.0]])))


def test_non_finite_values(tmp_path):
    with pytest.raises(ValueError, match="found NaN or infinity"):
        read_cells(write(tmp_path / "nan.h5ad", np.array([[1.5, np.nan]])))


@pytest.mark.parametrize("package", ["scanpy", "anndata"])
def test_missing_package_says_what_to_install(package, tmp_path, monkeypatch):
    path = write(tmp_path / "cells.h5ad", COUNTS)
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ImportError, match=r'pip install "stability-probes\[cells\]"'):
        pbmc68k() if package == "scanpy" else read_cells(path)


def test_pbmc68k_is_logged_and_labelled():
    pytest.importorskip("scanpy", reason='needs `pip install "stability-probes[cells]"`')
    cells = pbmc68k(label_column="bulk_labels")
    assert cells.expression.shape == (700, 765)
    assert cells.expression.data.max() < 10
    assert len(set(cells.labels)) == 10


@pytest.mark.skipif(not REAL_CELLS.is_dir(), reason="the real data sets are not beside this checkout")
def test_real_counts():
    cells = read_cells(REAL_CELLS / "deng_mouse_embryo.h5ad", label_column="cell_type")
    assert cells.expression.shape == (133, 11000)
    np.testing.assert_allclose(np.expm1(cells.expression.astype(float)).sum(axis=1), 10_000, rtol=1e-4)
    assert np.median(np.diff(cells.expression.indptr)) == 8021


def test_synthetic_cells_are_reproducible():
    first, second, other = (synthetic_cells(num_cells=8, num_genes=50, seed=seed) for seed in (1, 1, 2))
    assert (first.expression != second.expression).nnz == 0
    assert (first.expression != other.expression).nnz > 0


def test_synthetic_cells_are_long_enough_for_8192_tokens():
    cells = synthetic_cells(num_cells=16)
    assert np.diff(cells.expression.indptr).min() > 8192


def test_synthetic_types_can_be_told_apart():
    cells = synthetic_cells(num_cells=64, num_genes=400, num_types=4, counts_per_cell=8000)
    values = cells.expression.toarray()
    kinds = cells.labels
    means = np.stack([values[kinds == kind].mean(axis=0) for kind in np.unique(kinds)])
    nearest = ((values[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (np.unique(kinds)[nearest] == kinds).mean() > 0.9


@pytest.mark.parametrize("name", ["num_cells", "num_types", "counts_per_cell"])
def test_synthetic_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1; got 0"):
        synthetic_cells(**{name: 0})


def test_synthetic_types_need_genes():
    with pytest.raises(ValueError, match="`num_genes` must be at least `num_types`; got 3 and 4"):
        synthetic_cells(num_genes=3, num_types=4)
