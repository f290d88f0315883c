"""Torch's fused kernels against the reference: which calls they get, padding, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stability import softmax_attention
from stability.attention import fused_softmax
from stability.attention.call import AttentionCall
from stability.attention.validation import logit_terms


def make(tokens_q: int, tokens_k: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens_q * 1000 + tokens_k)
    shapes = [(3, 2, tokens_q, 64), (3, 2, tokens_k, 64), (3, 2, tokens_k, 64)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def terms_of(query: Tensor, key: Tensor, **arguments: Any) -> Any:
    return logit_terms(AttentionCall("softmax", query, key, **arguments))


@pytest.mark.parametrize("lengths", [None, [0, 3, 17], [17, 1, 16]])
def test_boundaries_cover_all_tokens_and_keep_the_valid_ones_together(lengths: list[int] | None) -> None:
    given = None if lengths is None else torch.tensor(lengths)
    boundaries = fused_softmax._boundaries(given, 3, 17, torch.device("cpu"))
    assert boundaries.dtype is torch.int32
    assert len(boundaries) == 3 * (fused_softmax.PADDING_PIECES + 1) + 1
    sizes = boundaries.diff().view(3, -1)
    assert sizes[:, 0].tolist() == (lengths or [17, 17, 17])
    assert sizes.sum(1).tolist() == [17, 17, 17]
    assert sizes[:, 1:].max() <= -(-17 // fused_softmax.PADDING_PIECES)


def played_by_the_reference(
    query: Tensor, key: Tensor, value: Tensor, q: Tensor, k: Tensor, *_: int
) -> Tensor:
    """What FlashAttention computes over lengths, sequence by sequence, since that needs a GPU."""
    pieces = []
    for a, b, c, d in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True):
        rows = [t.transpose(0, 1)[None] for t in (query[a:b], key[c:d], value[c:d])]
        if b > a:
            seen = softmax_attention(*rows) if d > c else torch.zeros_like(rows[0])
            pieces.append(seen[0].transpose(0, 1))
    return torch.cat(pieces)


def test_lengths_of_self_attention_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", played_by_the_reference)
    calls = []
    boundaries = fused_softmax._boundaries
    monkeypatch.setattr(
        fused_softmax, "_boundaries", lambda *arguments: calls.append(1) or boundaries(*arguments)
    )
    query, key, value = make(9, 9, "cpu", torch.float64)
    lengths = torch.tensor([4, 0, 9])
    terms = terms_of(query, key, key_lengths=lengths, query_lengths=lengths)
    actual = fused_softmax.attend(query, key, value, terms, 0.0)
    expected = softmax_attention(query, key, value, key_lengths=lengths, query_lengths=lengths)
    torch.testing.assert_close(actual, expected)
    assert len(calls) == 1


def test_memory_keeps_the_order_of_axes_and_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def remember(*tensors: Tensor) -> Tensor:
        received.extend(tensors[:3])
        return tensors[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", remember)
    query, key, value = (torch.randn(2, 9, 3, 8).transpose(1, 2) for _ in range(3))
    lengths = torch.tensor([4, 9])
    terms = terms_of(query, key, key_lengths=lengths, query_lengths=lengths)
    output = fused_softmax.attend(query, key, value, terms, 0.0)
    assert output.transpose(1, 2).is_contiguous()
    assert all(tensor._is_view() and tensor.is_contiguous() for tensor in received)


@pytest.mark.parametrize("query_lengths", [None, [0, 5, 9]])
@pytest.mark.parametrize("key_lengths", [None, [4, 0, 7]])
def test_lengths_mean_what_the_reference_means(
    query_lengths: list[int] | None, key_lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", played_by_the_reference)
    query, key, value = make(9, 7, "cpu", torch.float64)
    lengths = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    actual = fused_softmax.attend(query, key, value, terms_of(query, key, **lengths), 0.0)
    expected = softmax_attention(query, key, value, **lengths)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.cos().sum(), (query, key, value)),
        torch.autograd.grad(expected.cos().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_dense_calls_are_torchs_own() -> None:
    query, key, value = make(8, 8, "cpu", torch.float64)
    for arguments in ({}, {"is_causal": True}, {"scale": 0.3}):
        actual = fused_softmax.attend(query, key, value, terms_of(query, key, **arguments), 0.0)
        torch.testing.assert_close(actual, softmax_attention(query, key, value, **arguments))


def test_what_is_asked_for_by_name_is_computed_so_or_refused() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="\"fused\" cannot compute this call: the tensors are on 'cpu'"):
        softmax_attention(x, x, x, implementation="fused")
    with pytest.raises(ValueError, match="one of 'auto', 'fused', 'reference'; got 'flash'"):
        softmax_attention(x, x, x, implementation="flash")


def test_head_dimensions_over_lengths() -> None:
    for head_dim, reason in ((64, None), (20, "head dimensions that 8 divides, not 20")):
        query = torch.zeros(2, 1, 3, head_dim)
        found = fused_softmax._why_not_varlen(query, query, terms_of(query, query, key_lengths=[3, 1]), 0.0)
        assert found is None if reason is None else reason in found


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"key_lengths": [300, 0, 77], "query_lengths": [300, 5, 0]},
    "keys only": {"key_lengths": [300, 0, 77]},
    "queries only": {"query_lengths": [300, 0, 77]},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_on_a_gpu_equals_the_reference_whatever_the_padding_holds(call: str, dtype: torch.dtype) -> None:
    arguments = CALLS[call]
    query, key, value = make(300, 300, "cuda", dtype)
    weights = torch.randn(query.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def results(implementation: str, *inputs: Tensor) -> list[Tensor]:
        output = softmax_attention(*inputs, implementation=implementation, **arguments)
        return [output, *torch.autograd.grad((output.float() * weights).sum(), inputs)]

    exact = results("reference", *(x.detach().double().requires_grad_() for x in (query, key, value)))
    dirty = [x.detach().clone() for x in (query, key, value)]
    for x, lengths in zip(dirty, ("query_lengths", "key_lengths", "key_lengths"), strict=True):
        for sequence, length in enumerate(arguments.get(lengths, [300, 300, 300])):
            x[sequence, :, length:] = torch.nan
    fused = results("fused", *(x.requires_grad_() for x in dirty))
    for a, b in zip(fused, exact, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm().clamp_min(1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "attn_mask"),
        ({"key_lengths": [3], "is_causal": True}, "aligns causal order"),
        ({"key_lengths": [3], "dropout_p": 0.1}, "no dropout"),
        ({"key_lengths": [3], "scale": 0.1}, "no `scale`"),
        ({"key_lengths": [3], "head_dim": 20}, "that 8 divides"),
    ],
)
def test_on_a_gpu_other_calls_go_to_the_reference(arguments: dict[str, Any], reason: str) -> None:
    arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x = torch.randn(1, 2, 4, arguments.pop("head_dim", 8), device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=reason):
        softmax_attention(x, x, x, implementation="fused", **arguments)
    assert softmax_attention(x, x, x, **arguments).shape == x.shape
