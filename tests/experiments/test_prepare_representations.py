from __future__ import annotations

import numpy as np
import pytest

from experiments.cell_splits import split_cells
from experiments.cells import synthetic_cells
from experiments.prepare_representations import main, pca_embeddings, prepare
from experiments.representation_data import (
    DATASETS,
    Dataset,
    check_files,
    prepared_names,
    read_prepared,
    write_prepared,
)


@pytest.fixture
def h5ad(tmp_path):
    anndata = pytest.importorskip("anndata")
    generator = np.random.default_rng(0)
    data = anndata.AnnData(generator.poisson(1.0, size=(80, 30)).astype(np.float32))
    data.obs["kind"] = np.tile(["a", "b"], 40)
    data.obs["donor"] = np.repeat([f"d{i}" for i in range(8)], 10)
    path = tmp_path / "own.h5ad"
    data.write_h5ad(path)
    return path


def test_a_file_of_ones_own(h5ad, tmp_path, capsys):
    out = tmp_path / "prepared.npz"
    flags = ["--data", str(h5ad), "--label", "kind", "--group", "donor", "--out", str(out)]
    assert main(flags) == 0
    assert "groups held out (donor)); 30 genes" in capsys.readouterr().out
    assert prepared_names(out) == ["own-kind"]
    data = read_prepared(out, "own-kind")
    assert set(data.cells.labels) == {"a", "b"}
    donors = np.repeat(np.arange(8), 10)
    assert not set(donors[data.split.is_test]) & set(donors[~data.split.is_test])
    assert len(data.side(data.split.is_test)) == len(data.pca) == data.split.is_test.sum()


def test_what_is_written_is_read_back(h5ad, tmp_path):
    prepared = prepare(Dataset("own", h5ad, "kind"))
    write_prepared(tmp_path / "folder" / "cells.npz", {"own": prepared})
    again = read_prepared(tmp_path / "folder" / "cells.npz", "own")
    assert (again.cells.expression != prepared.cells.expression).nnz == 0
    for field in ("is_test", "is_validation", "rule"):
        assert np.array_equal(getattr(again.split, field), getattr(prepared.split, field))
    assert np.array_equal(again.pca, prepared.pca)
    assert again.digest == prepared.digest
    assert again.cells.source == "own.h5ad"


def test_pca_knows_nothing_of_held_out_cells():
    cells = synthetic_cells(num_cells=60, num_genes=40, num_types=3, counts_per_cell=300)
    split = split_cells(cells.labels, None)
    before = pca_embeddings(cells, split)
    changed = cells.expression.copy().tolil()
    changed[np.flatnonzero(split.is_test)[0]] = 5.0
    after = pca_embeddings(type(cells)(changed.tocsr(), cells.genes, cells.labels, ""), split)
    assert not np.allclose(before[0], after[0])
    assert np.allclose(before[1:], after[1:], atol=1e-5)
    assert before.shape == (split.is_test.sum(), min(40, split.is_train.sum(), 50))


def test_every_missing_file_is_named_with_its_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--out", str(tmp_path / "cells.npz")]) == 2
    error = capsys.readouterr().err
    for dataset in DATASETS.values():
        assert f"{dataset.file}: {dataset.origin}" in error
    with pytest.raises(FileNotFoundError, match="given on the command line"):
        check_files([Dataset("own", tmp_path / "own.h5ad")])


def test_a_column_that_is_not_there(h5ad, tmp_path, capsys):
    assert main(["--data", str(h5ad), "--label", "tissue", "--out", str(tmp_path / "cells.npz")]) == 2
    assert "no label column 'tissue'" in capsys.readouterr().err


def with_gaps(h5ad, column):
    anndata = pytest.importorskip("anndata")
    data = anndata.read_h5ad(h5ad)
    data.obs[column] = data.obs[column].astype(object).where(np.arange(80) >= 3, None)
    data.write_h5ad(h5ad)


def test_cells_without_a_type_are_left_out_and_told_of(h5ad, capsys):
    with_gaps(h5ad, "kind")
    prepared = prepare(Dataset("own", h5ad, "kind", "donor"))
    assert set(prepared.cells.labels) == {"a", "b"}
    assert len(prepared.cells) == len(prepared.groups) == len(prepared.split.is_test) == 77
    assert "own: 3 cells without kind are left out" in capsys.readouterr().out


def test_cells_without_a_donor_are_refused(h5ad, tmp_path, capsys):
    with_gaps(h5ad, "donor")
    flags = ["--data", str(h5ad), "--label", "kind", "--group", "donor", "--out", str(tmp_path / "cells.npz")]
    assert main(flags) == 2
    assert "3 have none. Leave --group out" in capsys.readouterr().err


def test_files_that_are_not_prepared(tmp_path, h5ad):
    with pytest.raises(FileNotFoundError, match=r"experiments\.prepare_representations"):
        read_prepared(tmp_path / "none.npz", "own")
    write_prepared(tmp_path / "cells.npz", {"own": prepare(Dataset("own", h5ad, "kind"))})
    with pytest.raises(ValueError, match=r"'liver' in .*; it holds own"):
        read_prepared(tmp_path / "cells.npz", "liver")


def test_six_data_sets_and_a_control():
    assert len(DATASETS) == 7
    assert [name for name, each in DATASETS.items() if each.is_control] == ["scmixology_human_celllines"]
