"""Each function's call, rerouted, against sigmoid attention written out densely."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import stability

q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 3)


class Model(nn.Module):
    def __init__(self, function: Callable[[], Tensor]) -> None:
        super().__init__()
        self.functions = [function]

    def forward(self) -> Tensor:
        return self.functions[0]()


def rerouted(function: Callable[[], Tensor]) -> Tensor:
    model = Model(function)
    with stability.replace_attention(model, "sigmoid", bias=-1.0) as replaced:
        output = model()
    assert [site.calls for site in replaced.sites] == [1]
    return output


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 8**-0.5
) -> Tensor:
    """Sigmoid attention with a mask that is added to the logits, and bias −1."""
    if key.dim() == 4 and key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * scale - 1
    return torch.sigmoid(logits if mask is None else logits + mask) @ value


def added(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def sdpa(*args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    return lambda: functional.scaled_dot_product_attention(*args, **kwargs)


class TestTorch:
    def test_cross_attention_of_grouped_queries_with_a_scale(self) -> None:
        output = rerouted(sdpa(q, k, v, scale=0.3, enable_gqa=True))
        torch.testing.assert_close(output, dense(q, k, v, scale=0.3))

    def test_causal_order_is_aligned_at_the_first_query_and_key(self) -> None:
        causal = added(torch.ones(6, 9, dtype=torch.bool).tril())
        output = rerouted(sdpa(q[:, :2], k, v, is_causal=True))
        torch.testing.assert_close(output, dense(q[:, :2], k, v, causal))

    @pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 1, 9), (2, 1, 1, 9), (2, 4, 6, 9)])
    def test_masks(self, shape: tuple[int, ...]) -> None:
        bias, allowed = torch.randn(shape), torch.rand(shape) > 0.3
        heads = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        torch.testing.assert_close(rerouted(sdpa(q, *heads, attn_mask=bias)), dense(q, k, v, bias))
        torch.testing.assert_close(rerouted(sdpa(q, *heads, allowed)), dense(q, k, v, added(allowed)))

    @pytest.mark.parametrize("batch", [(), (3,), (2, 3, 4)])
    def test_other_numbers_of_axes(self, batch: tuple[int, ...]) -> None:
        query, key, value = torch.randn(*batch, 6, 8), torch.randn(*batch, 9, 8), torch.randn(*batch, 9, 3)
        mask = torch.randn(*batch, 6, 9)
        torch.testing.assert_close(rerouted(sdpa(query, key, value, mask)), dense(query, key, value, mask))

    @pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
    @pytest.mark.parametrize("mask", [(6, 9), (4, 1, 9), (3, 1, 4, 6, 9)])
    def test_other_numbers_of_axes_with_grouped_queries(
        self, batch: tuple[int, ...], mask: tuple[int, ...]
    ) -> None:
        query, key, value = (
            torch.randn(*batch, heads, *x.shape[2:]) for x, heads in ((q, 4), (k, 2), (v, 2))
        )
        added_mask = torch.randn(mask if len(mask) <= query.dim() else mask[-2:])
        output = rerouted(sdpa(query, key, value, attn_mask=added_mask, enable_gqa=True))
        expected = dense(query, key.repeat_interleave(2, -3), value.repeat_interleave(2, -3), added_mask)
        torch.testing.assert_close(output, expected)

    def test_batches_that_broadcast_with_grouped_queries(self) -> None:
        output = rerouted(sdpa(q, k[:1], v[:1], enable_gqa=True))
        torch.testing.assert_close(output, dense(q, k[:1], v[:1]))

    def test_keys_with_more_axes_than_queries(self) -> None:
        mask = torch.randn(4, 6, 9)
        key, value = (x.repeat_interleave(2, 1) for x in (k, v))
        torch.testing.assert_close(
            rerouted(sdpa(q[0], key, value, attn_mask=mask)), dense(q[:1], key, value, mask)
        )

    def test_batches_that_broadcast(self) -> None:
        output = rerouted(sdpa(q[:1], k[:, :1], v[:, :1]))
        torch.testing.assert_close(output, dense(q[:1], k[:, :1], v[:, :1]))

    def test_gradients_reach_a_learned_mask(self) -> None:
        mask = torch.randn(4, 6, 9, requires_grad=True)
        arguments = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        (grad,) = torch.autograd.grad(rerouted(sdpa(*arguments, mask)).square().sum(), mask)
        (expected,) = torch.autograd.grad(dense(*arguments, mask).square().sum(), mask)
        torch.testing.assert_close(grad, expected)

    def test_dropout_drops_weights(self) -> None:
        eye = torch.eye(64).expand(1, 1, 64, 64)
        zero = torch.zeros(1, 1, 64, 8)
        weights = rerouted(sdpa(zero, zero, eye, dropout_p=0.5))
        kept = weights != 0
        assert 0.45 < kept.float().mean() < 0.55
        torch.testing.assert_close(weights[kept], (2 * torch.sigmoid(torch.tensor(-1.0))).expand(kept.sum()))


class TestFlex:
    def test_masks_are_evaluated(self) -> None:
        documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9])

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (documents[b, i] == documents[b, j]) & (i >= j - h)

        block_mask = create_block_mask(mask, 2, 4, 6, 9, device="cpu")
        query = q.clone().requires_grad_()
        output = rerouted(lambda: flex_attention(query, k, v, block_mask=block_mask, enable_gqa=True))
        i, j, h = torch.arange(6)[:, None], torch.arange(9), torch.arange(4)[:, None, None]
        allowed = (documents[:, None, :6, None] == documents[:, None, None]) & (i >= j - h)
        expected = dense(query, k, v, added(allowed))
        torch.testing.assert_close(output, expected)
        (grad,) = torch.autograd.grad(output.square().sum(), query)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), query)[0])

    def test_without_masks(self) -> None:
        output = rerouted(lambda: flex_attention(q, k, v, scale=0.3, enable_gqa=True))
        torch.testing.assert_close(output, dense(q, k, v, scale=0.3))

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"score_mod": lambda score, b, h, i, j: score * 2}, "score_mod"),
            ({"return_lse": True}, "log-sum-exp"),
            (
                {
                    "block_mask": BlockMask.from_kv_blocks(
                        torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
                    )
                },
                "no mask_mod",
            ),
        ],
    )
    def test_what_sigmoid_attention_does_not_know_is_refused(
        self, arguments: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(NotImplementedError, match=rf"\(root\) \(.*flex_attention\).*{reason}"):
            rerouted(lambda: flex_attention(q, q, q, **arguments))


class TestFlash:
    @pytest.fixture
    def package(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        package: Any = ModuleType("flash_attn")
        for name in ("func", "qkvpacked_func", "kvpacked_func", "varlen_func"):
            setattr(package, f"flash_attn_{name}", lambda *_, **__: pytest.fail("not rerouted"))
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        return package

    def test_the_three_functions(self, package: Any) -> None:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        output = rerouted(lambda: package.flash_attn_func(query, key, value, softmax_scale=0.3))
        torch.testing.assert_close(output.transpose(1, 2), dense(q, k, v, scale=0.3))
        key_value = torch.stack([key, key], dim=2)
        output = rerouted(lambda: package.flash_attn_kvpacked_func(query, key_value, 0.0, 0.3))
        torch.testing.assert_close(output.transpose(1, 2), dense(q, k, k, scale=0.3))
        packed = torch.stack([query, query, query], dim=2)
        output = rerouted(lambda: package.flash_attn_qkvpacked_func(packed, causal=True))
        causal = added(torch.ones(6, 6, dtype=torch.bool).tril())
        torch.testing.assert_close(output.transpose(1, 2), dense(q, q, q, causal))

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"window_size": (2, 0)}, "windows"),
            ({"softcap": 5.0}, "soft-cap"),
            ({"return_attn_probs": True}, "probabilities"),
        ],
    )
    def test_what_sigmoid_attention_does_not_know_is_refused(
        self, package: Any, arguments: dict[str, Any], reason: str
    ) -> None:
        x = q.transpose(1, 2)
        with pytest.raises(NotImplementedError, match=reason):
            rerouted(lambda: package.flash_attn_func(x, x, x, **arguments))
        with pytest.raises(NotImplementedError, match="no counterpart"):
            rerouted(lambda: package.flash_attn_varlen_func(x[0], x[0], x[0]))
