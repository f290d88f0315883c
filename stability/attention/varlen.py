"""Sigmoid attention over packed sequences: no padding is stored or computed."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from stability.attention.autocast import cast_under_autocast, without_autocast
from stability.attention.call import AttentionCall
from stability.attention.dispatch import Implementation, Precision, check_choice, choose
from stability.attention.observers import is_observed, notify
from stability.attention.operands import make_operands
from stability.attention.operator import attend
from stability.attention.packing import Packing, check_offsets, packed_reference
from stability.attention.validation import can_be_read, check_value, logit_terms


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: float | Tensor | None = None,
    score_bias: Tensor | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "accurate",
) -> Tensor:
    """Sigmoid attention within each of several sequences that lie one behind the other.

    The layout and the names of ``flash_attn_varlen_func``; everything else as in
    :func:`stability.sigmoid_attention`. Sequence i holds the tokens from ``cu_seqlens[i]`` up to
    ``cu_seqlens[i + 1]``. Tokens outside every sequence give zeros and have gradient zero.

    Args:
        query: [total_tokens_q, heads, head_dim], floating point.
        key: [total_tokens_k, heads, head_dim]; fewer heads with `enable_gqa`.
        value: [total_tokens_k, heads, value_dim]; the key's heads.
        cu_seqlens_q: [sequences + 1] integers on the query's device, 0 first and never falling. Checked on
            the CPU, clamped to the tokens there are on other devices.
        cu_seqlens_k: Likewise for key and value.
        max_seqlen_q: Queries of the longest sequence, or more. Checked on the CPU; on other devices those
            beyond it are not computed.
        max_seqlen_k: Keys of the longest sequence, or more; likewise.
        is_causal: Query i of a sequence sees its keys j ≤ i (top-left aligned).
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Lets each group of heads / key_heads consecutive query heads share one key and value head.
        bias: A number, a 0-d tensor, [heads] or [sequences, heads]; differentiable. None means −ln of the
            number of keys of each sequence.
        score_bias: Per-key bias, [total_tokens_k]; differentiable.
        implementation: "auto", or one by name: "triton", "reference" (which pads).
        precision: "accurate" or "fast", as in :func:`stability.sigmoid_attention`.

    Returns:
        [total_tokens_q, heads, value_dim].

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device, or an implementation that cannot compute the call.

    Example:
        >>> import torch
        >>> query, value = torch.zeros(3, 1, 4), torch.eye(3)[:, None]
        >>> offsets = torch.tensor([0, 2, 3])
        >>> sigmoid_attention_varlen(
        ...     query, query, value,
        ...     cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=2, max_seqlen_k=2,
        ... ).squeeze(1)
        tensor([[0.3333, 0.3333, 0.0000],
                [0.3333, 0.3333, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    check_choice(implementation, precision)
    query, key, value = (
        _with_batch(name, tensor) for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    query, key, value = cast_under_autocast(query, key, value)
    packing = Packing(
        check_offsets("cu_seqlens_q", cu_seqlens_q, query),
        check_offsets("cu_seqlens_k", cu_seqlens_k, key),
        _check_maximum("max_seqlen_q", max_seqlen_q),
        _check_maximum("max_seqlen_k", max_seqlen_k),
    )
    _check_longest("max_seqlen_q", packing.max_tokens_q, packing.query_offsets)
    _check_longest("max_seqlen_k", packing.max_tokens_k, packing.key_offsets)
    sequences = packing.query_offsets.shape[0] - 1
    if packing.key_offsets.shape[0] - 1 != sequences:
        raise ValueError(
            "`cu_seqlens_q` and `cu_seqlens_k` must describe equally many sequences; "
            f"got {sequences} and {packing.key_offsets.shape[0] - 1}."
        )
    if isinstance(score_bias, Tensor) and score_bias.shape != (key.shape[2],):
        raise ValueError(
            f"`score_bias` must have one entry per packed key, shape ({key.shape[2]},); "
            f"got {tuple(score_bias.shape)}."
        )
    # Every sequence as if it had all tokens: only the lengths of its keys enter the terms, through the bias.
    call = AttentionCall(
        mechanism="sigmoid",
        query=query.expand(sequences, -1, -1, -1),
        key=key.expand(sequences, -1, -1, -1),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=packing.key_lengths,
        bias=bias,
        score_bias=score_bias,
    )
    terms = replace(logit_terms(call), key_lengths=None)
    check_value(key, value)
    is_fast = precision == "fast"
    kernel = choose(query, value, terms, 0.0, implementation, is_fast=is_fast)
    if is_observed():
        notify(_padded_call(call, query, key, packing))
    if kernel is None:
        with without_autocast(query):
            output = packed_reference(query, key, value, terms, packing)
    else:
        output, _, _ = attend(
            make_operands(query, key, value, terms, packing),
            scale=terms.scale,
            is_causal=terms.is_causal,
            is_fast=is_fast,
            implementation=kernel,
            packing=packing,
        )
    return output[0].transpose(0, 1)


def _with_batch(name: str, packed: Tensor) -> Tensor:
    """[total_tokens, heads, dim] → [1, heads, total_tokens, dim], without a copy."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(packed).__name__}.")
    if packed.ndim != 3:
        raise ValueError(
            f"`{name}` must have shape [total_tokens, heads, head_dim]; got {tuple(packed.shape)}. "
            "Sequences that are padded to one length go to sigmoid_attention."
        )
    return packed.transpose(0, 1)[None]


def _check_maximum(name: str, maximum: int) -> int:
    if isinstance(maximum, bool) or not isinstance(maximum, int):
        raise TypeError(f"`{name}` must be an integer; got {type(maximum).__name__}.")
    if maximum < 1:
        raise ValueError(f"`{name}` must be at least 1; got {maximum}.")
    return maximum


def _check_longest(name: str, maximum: int, offsets: Tensor) -> None:
    """Where it costs nothing to look; elsewhere the caller is trusted."""
    if can_be_read(offsets) and (longest := int(offsets.diff().max())) > maximum:
        raise ValueError(f"`{name}` must be at least the longest sequence's {longest} tokens; got {maximum}.")


def _padded_call(call: AttentionCall, query: Tensor, key: Tensor, packing: Packing) -> AttentionCall:
    """The call as observers know calls: padded sequences with their lengths."""
    score_bias = call.score_bias
    return replace(
        call,
        query=packing.pad_queries(query),
        key=packing.pad_keys(key),
        key_lengths=packing.key_lengths,
        query_lengths=packing.query_lengths,
        score_bias=None
        if score_bias is None
        else packing.pad_keys(score_bias[None, None, :, None])[:, 0, :, 0],
    )
