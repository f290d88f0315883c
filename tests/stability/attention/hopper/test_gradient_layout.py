"""The memory that the Hopper backward gives its results in: compiled graphs rely on what was announced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stability.attention.hopper.eligibility import COMPILED_WITH, installed_triton
from stability.attention.layout import empty_like_tokens

pytest.importorskip("triton", reason="Triton is not installed")
if installed_triton() not in COMPILED_WITH:
    pytest.skip(f"no Gluon as in triton {', '.join(COMPILED_WITH)}", allow_module_level=True)
from stability.attention.hopper import sigmoid_backward


class Launches:
    """In the place of a kernel: computes nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: None


def heads_first(heads: int, tokens: int) -> Tensor:
    return torch.zeros(2, heads, tokens, 64, dtype=torch.bfloat16)


def tokens_first(heads: int, tokens: int) -> Tensor:
    return torch.zeros(2, tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("key", [heads_first, tokens_first])
@pytest.mark.parametrize("value", [heads_first, tokens_first])
def test_each_gradient_has_the_order_of_axes_of_its_tensor(
    key: Any, value: Any, group: int, is_deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sigmoid_backward, "sigmoid_backward", Launches())
    tensors = tokens_first(2 * group, 10), key(2, 12), value(2, 12)
    gradients = sigmoid_backward.backward(
        torch.zeros_like(tensors[0]), *tensors, scale=1.0, bias=torch.zeros(2, 2 * group), score_bias=None,
        key_lengths=None, query_lengths=None, is_causal=False, is_deterministic=is_deterministic,
    )  # fmt: skip
    for gradient, tensor in zip(gradients[:3], tensors, strict=True):
        announced = empty_like_tokens(tensor, 64)  # what the operator's fake kernel makes
        assert gradient.shape == announced.shape
        assert gradient.dtype == announced.dtype
        assert gradient.stride() == announced.stride()
