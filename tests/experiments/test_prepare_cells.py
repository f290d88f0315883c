from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from experiments.cells import Cells
from experiments.prepare_cells import commonest_genes, embryos, held_out, main

REAL_CELLS = Path(__file__).parents[3] / "shared" / "cells" / "deng_mouse_embryo.h5ad"


def test_the_commonest_genes_of_training_cells_stay_in_their_order():
    expression = sparse.csr_matrix(
        np.array([[1, 2, 0, 4], [1, 0, 3, 4], [0, 0, 0, 4], [0, 5, 5, 5]], dtype=np.float32)
    )
    cells = Cells(expression, np.array(["a", "b", "c", "d"]), np.array(["x", "y", "z", "w"]), "by hand")
    is_validation = np.array([False, False, False, True])  # with its say, b and c were as common as a
    kept = commonest_genes(cells, is_validation, 2)
    assert kept.genes.tolist() == ["a", "d"]
    np.testing.assert_array_equal(kept.expression.toarray(), [[1, 4], [1, 4], [0, 4], [0, 5]])
    assert kept.labels.tolist() == ["x", "y", "z", "w"]


def test_a_gene_of_held_out_cells_alone_is_not_kept():
    expression = sparse.csr_matrix(np.array([[1, 0], [1, 0], [1, 7], [1, 7], [1, 7]], dtype=np.float32))
    cells = Cells(expression, np.array(["a", "b"]), None, "by hand")
    assert commonest_genes(cells, np.arange(5) >= 2, 1).genes.tolist() == ["a"]


def test_a_cell_without_a_kept_gene():
    expression = sparse.csr_matrix(np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32))
    cells = Cells(expression, np.array(["a", "b"]), None, "by hand")
    with pytest.raises(ValueError, match="one of the 1 commonest genes; 1 express none"):
        commonest_genes(cells, np.zeros(3, dtype=bool), 1)


def test_no_embryo_is_on_both_sides():
    names = np.array([f"GSM{i}_earlyblast_{i % 7}.{i}_expression" for i in range(50)])
    groups = embryos(names)
    assert set(groups) == {f"earlyblast_{i}" for i in range(7)}
    for seed in range(5):
        is_validation = held_out(groups, 0.3, seed)
        assert set(groups[is_validation]).isdisjoint(groups[~is_validation])
        assert 8 <= is_validation.sum() <= 15
    assert (held_out(groups, 0.3, seed=0) != held_out(groups, 0.3, seed=1)).any()


def test_cells_without_an_embryo_are_held_out_one_by_one():
    names = np.array([f"cell {i}" for i in range(10)])
    assert embryos(names).tolist() == names.tolist()
    assert held_out(names, 0.2, seed=0).sum() == 2
    assert held_out(names[:4], 0.01, seed=0).sum() == 2


@pytest.mark.parametrize("groups", [["a", "b", "c"], ["a", "a", "a", "b"], ["a"] * 9])
def test_too_few_groups(groups):
    with pytest.raises(ValueError, match="leave two on either side; "):
        held_out(np.array(groups), 0.2, seed=0)


def test_a_missing_file_ends_with_status_2(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.h5ad"), "--out", str(tmp_path / "cells.npz")]) == 2
    assert "there is none at" in capsys.readouterr().err
    assert not (tmp_path / "cells.npz").exists()


@pytest.mark.skipif(not REAL_CELLS.exists(), reason="needs ../shared/cells beside the checkout")
def test_the_embryo_becomes_a_small_file(tmp_path, capsys):
    pytest.importorskip("anndata", reason='needs `pip install "stability-probes[cells]"`')
    out = tmp_path / "cells.npz"
    assert main(["--data", str(REAL_CELLS), "--out", str(out)]) == 0
    assert out.stat().st_size < 5e6
    assert (
        "133 cells of deng_mouse_embryo.h5ad, 26 held out (late2cell_8, mid2cell_6, midblast_1), 10240 genes"
    ) in capsys.readouterr().out
