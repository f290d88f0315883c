"""What notebooks show of results."""

from __future__ import annotations

import math

import pytest
import torch

import stability
from stability import LayerJacobianNorms
from stability.html_table import html_table, spread_rows


def test_what_others_wrote_is_escaped() -> None:
    table = html_table(["<b>"], [["`a<b` & <script>"]])
    assert table == (
        "<table><tr><th>&lt;b&gt;</th></tr><tr><td><code>a&lt;b</code> &amp; &lt;script&gt;</td></tr></table>"
    )
    assert html_table(["", ""], []) == "<table></table>"


def test_a_tensor_without_rows_or_with_nan_is_shown() -> None:
    assert spread_rows([("a", torch.zeros(0)), ("b", torch.tensor([1.0, float("nan")]))]) == [
        ["a", "–", "–", "–"],
        ["b", "nan", "nan", "nan"],
    ]


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (0, 3)])
def test_row_jacobian_norms(shape: tuple[int, ...]) -> None:
    page = stability.softmax_jacobian_norms(torch.zeros(shape))._repr_html_()
    assert page.count("<tr>") == 7
    rows = math.prod(shape[:-1])
    assert f"{rows} of {rows} rows have infinity_to_one exactly" in page
    assert ("<td>spectral</td><td>0.3333</td>" in page) == (rows > 0)


def test_layer_jacobian_norms() -> None:
    norms = LayerJacobianNorms(*torch.tensor([2.5, 1e-6, 3.25, 0.125]))
    assert "<td>spectral</td><td>2.5</td><td>from below; residual 1.0e-06</td>" in norms._repr_html_()
    assert "<td>frobenius</td><td>3.25</td><td>± 0.12</td>" in norms._repr_html_()


def test_bound_checks() -> None:
    check = stability.verify_sigmoid_derivative_bound(torch.float16)
    assert "<td>holds</td><td>0.25</td>" in check._repr_html_()
    broken = type(check)("σ′ <x>", 0.25, 0.5, 0.0, 10, 3)
    assert "<td>σ′ &lt;x&gt;</td><td>3 violations</td>" in broken._repr_html_()
    checks = stability.verify_softmax_jacobian_bounds(num_keys=(2,), num_rows=4, num_climbing_steps=1)
    assert checks._repr_html_().count("<tr>") == 4
