from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from experiments.cells import Cells
from experiments.prepare_cells import commonest_genes, held_out, main

REAL_CELLS = Path(__file__).parents[3] / "shared" / "cells" / "deng_mouse_embryo.h5ad"


def test_the_commonest_genes_stay_in_their_order():
    expression = sparse.csr_matrix(np.array([[1, 2, 0, 4], [1, 0, 3, 4], [0, 0, 0, 4]], dtype=np.float32))
    cells = Cells(expression, np.array(["a", "b", "c", "d"]), None, "by hand")
    kept = commonest_genes(cells, 2)
    assert kept.genes.tolist() == ["a", "d"]
    np.testing.assert_array_equal(kept.expression.toarray(), [[1, 4], [1, 4], [0, 4]])
    assert len(commonest_genes(cells, 1)) == 3


def test_cells_without_a_kept_gene_are_dropped():
    expression = sparse.csr_matrix(np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32))
    kept = commonest_genes(Cells(expression, np.array(["a", "b"]), np.array(["x", "y", "z"]), "by hand"), 1)
    assert len(kept) == 2
    assert kept.labels.tolist() == ["x", "y"]


def test_two_cells_stay_on_either_side():
    assert held_out(4, 0.01, seed=0).sum() == 2
    assert held_out(4, 0.99, seed=0).sum() == 2
    assert (held_out(50, 0.2, seed=0) != held_out(50, 0.2, seed=1)).any()


def test_too_few_cells():
    with pytest.raises(ValueError, match="at least 4 cells to hold some out; got 3"):
        held_out(3, 0.2, seed=0)


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
    assert "133 cells of deng_mouse_embryo.h5ad, 27 held out, 10240 genes" in capsys.readouterr().out
