"""The two attention functions users call, and what explains the choice between their implementations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stability.attention import fused_softmax, reference
from stability.attention.autocast import cast_under_autocast, without_autocast
from stability.attention.call import AttentionCall
from stability.attention.dispatch import (
    Explanation,
    Implementation,
    Precision,
    SoftmaxImplementation,
    check_choice,
    check_softmax_choice,
    choose,
    why_not_triton,
)
from stability.attention.kernel_call import choose_kernel
from stability.attention.observers import notify
from stability.attention.operands import make_operands
from stability.attention.operator import attend
from stability.attention.validation import LogitTerms, check_dropout, check_value, logit_terms


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    query_lengths: Tensor | Sequence[int] | None = None,
    implementation: SoftmaxImplementation = "auto",
) -> Tensor:
    """Scaled dot-product attention with torch's meanings, and padding given by lengths.

    Formula: softmax(scale · Q Kᵀ + attn_mask) V, each row over its allowed keys. A row without an allowed key
    gives zeros. Logits and weights are float32 (float64 for float64 inputs); the weights are rounded to the
    value's dtype for the second product. Under autocast query, key and value are cast first, as torch does.

    On CUDA, half-precision calls go to torch's fused kernels where these have the same meanings: no
    `attn_mask`, causal only with as many queries as keys and without lengths. Those kernels have no second
    derivative; `implementation="reference"` has.

    Args:
        query: [batch, heads, tokens_q, head_dim], floating point.
        key: [batch, heads, tokens_k, head_dim]; fewer heads with `enable_gqa`.
        value: [batch, heads, tokens_k, value_dim]; the key's heads.
        attn_mask: Broadcastable to [batch, heads, tokens_q, tokens_k]. Boolean: True takes part. Floating
            point: added to the logits.
        dropout_p: Probability of dropping a weight, in [0, 1). Applied whenever it is positive.
        is_causal: Query i sees the keys j ≤ i (top-left aligned). Combines with `attn_mask`.
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Lets each group of heads / key_heads consecutive query heads share one key and value head.
        key_lengths: [batch] integers; keys and values from there on are padding, whatever they hold, and have
            gradient zero. Range-checked on the CPU, clamped on other devices. None: no padding.
        query_lengths: [batch] integers; output rows from there on are zeros, with gradient zero. None: all
            rows are valid, also where `key_lengths` is given.
        implementation: "auto", "fused" (torch's kernels or an error) or "reference" (plain PyTorch).

    Returns:
        [batch, heads, tokens_q, value_dim].

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device, or "fused" for a call that it cannot compute.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    Example:
        >>> import torch
        >>> query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.eye(3)[None, None]
        >>> softmax_attention(query, key, value, key_lengths=[2])
        tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """
    query, key, value = cast_under_autocast(query, key, value)
    call = AttentionCall(
        mechanism="softmax",
        query=query,
        key=key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
    )
    terms = _check(call, value, dropout_p)
    check_softmax_choice(implementation)
    reason = None
    if implementation != "reference":
        reason = fused_softmax.why_not_fused(query, key, value, terms, dropout_p)
    if reason is not None and implementation == "fused":
        raise ValueError(f'implementation="fused" cannot compute this call: {reason}. Pass "auto".')
    notify(call)
    with without_autocast(query):
        if implementation != "reference" and reason is None:
            return fused_softmax.attend(query, key, value, terms, dropout_p)
        return reference.softmax_attention(query, key, value, terms, dropout_p)


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    query_lengths: Tensor | Sequence[int] | None = None,
    bias: float | Tensor | None = None,
    score_bias: Tensor | None = None,
    implementation: Implementation = "auto",
    precision: Precision = "accurate",
) -> Tensor:
    """Sigmoid attention: every weight is decided on its own, without normalisation over the keys.

    Formula: σ(scale · Q Kᵀ + attn_mask + score_bias + bias) V. The default bias −ln n makes the weights of a
    row sum to about 1 where the logits are near 0. Precision and autocast as in :func:`softmax_attention`.

    On CUDA a kernel computes it in O(tokens) memory wherever one can; the rule is in
    `stability.attention.dispatch`, and :func:`stability.attention.explain` says what it makes of a call.
    Second and higher derivatives go through the reference, with a warning.

    Args:
        query: [batch, heads, tokens_q, head_dim], floating point.
        key: [batch, heads, tokens_k, head_dim]; fewer heads with `enable_gqa`.
        value: [batch, heads, tokens_k, value_dim]; the key's heads.
        attn_mask: Broadcastable to [batch, heads, tokens_q, tokens_k]. Boolean: True takes part. Floating
            point: added to the logits.
        dropout_p: Probability of dropping a weight, in [0, 1). Applied whenever it is positive.
        is_causal: Query i sees the keys j ≤ i (top-left aligned). Combines with `attn_mask`.
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Lets each group of heads / key_heads consecutive query heads share one key and value head.
        key_lengths: [batch] integers; keys and values from there on are padding, whatever they hold, and have
            gradient zero. Range-checked on the CPU, clamped on other devices. None: no padding.
        query_lengths: [batch] integers; output rows from there on are zeros, with gradient zero. None: all
            rows are valid, also where `key_lengths` is given.
        bias: A number, a 0-d tensor, [heads] or [batch, heads]; differentiable. None means
            −ln(max(key_lengths, 1)) per sequence, or −ln tokens_k without lengths: the same for all rows of a
            sequence, causal or not.
        score_bias: Per-key bias, [tokens_k] or [batch, tokens_k]; differentiable.
        implementation: "auto", the fastest that can compute the call, or one by name: "hopper", "triton",
            "reference".
        precision: "accurate": relative error of σ at most 2.5e-4 in half precision and 2e-6 in float32, for
            every logit down to −20. "fast": σ(x) = ½ + ½ tanh.approx(x/2), at most 1e-4 down to −6; below,
            its error does not shrink with σ: 1e-2 of a weight at the default bias of long sequences. Half
            precision only.

    Returns:
        [batch, heads, tokens_q, value_dim].

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device, or an implementation that cannot compute the call.

    Source:
        Ramapuram et al. 2024 (arXiv 2409.04431), which also gives the bias −ln n.

    Example:
        >>> import torch
        >>> query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.eye(3)[None, None]
        >>> sigmoid_attention(query, key, value, key_lengths=[2])
        tensor([[[[0.3333, 0.3333, 0.0000]]]])
    """
    check_choice(implementation, precision)
    query, key, value = cast_under_autocast(query, key, value)
    call = AttentionCall(
        mechanism="sigmoid",
        query=query,
        key=key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        bias=bias,
        score_bias=score_bias,
    )
    terms = _check(call, value, dropout_p)
    is_fast = precision == "fast"
    kernel = choose(query, value, terms, dropout_p, implementation, is_fast=is_fast)
    notify(call)
    if kernel is None:
        with without_autocast(query):
            return reference.sigmoid_attention(query, key, value, terms, dropout_p)
    operands = make_operands(query, key, value, terms)
    return attend(
        operands, scale=terms.scale, is_causal=terms.is_causal, is_fast=is_fast, implementation=kernel
    )[0]


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    query_lengths: Tensor | Sequence[int] | None = None,
    bias: float | Tensor | None = None,
    score_bias: Tensor | None = None,
    precision: Precision = "accurate",
) -> Explanation:
    """Which implementation :func:`sigmoid_attention` would take for these arguments, and why no faster one.

    Computes nothing and waits for nothing. The arguments are those of :func:`sigmoid_attention`.

    Args:
        query: [batch, heads, tokens_q, head_dim], floating point.
        key: [batch, heads, tokens_k, head_dim]; fewer heads with `enable_gqa`.
        value: [batch, heads, tokens_k, value_dim]; the key's heads.
        attn_mask: Broadcastable to [batch, heads, tokens_q, tokens_k].
        dropout_p: Probability of dropping a weight, in [0, 1).
        is_causal: Query i sees the keys j ≤ i.
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Whether groups of query heads share a key head.
        key_lengths: [batch] integers.
        query_lengths: [batch] integers.
        bias: A number, a 0-d tensor, [heads] or [batch, heads].
        score_bias: [tokens_k] or [batch, tokens_k].
        precision: "accurate" or "fast".

    Returns:
        The implementation and the reasons against the faster ones; printed, a few sentences.

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device, or a call that no implementation can compute.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, 4, 8)
        >>> print(explain(x, x, x, dropout_p=0.1))
        sigmoid_attention runs on 'reference'.
          not 'hopper': ...
          not 'triton': ...
    """
    check_choice("auto", precision)
    query, key, value = cast_under_autocast(query, key, value)
    call = AttentionCall(
        mechanism="sigmoid",
        query=query,
        key=key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        bias=bias,
        score_bias=score_bias,
    )
    terms = _check(call, value, dropout_p)
    is_fast = precision == "fast"
    if (reason := why_not_triton(query, value, terms, dropout_p=dropout_p, is_fast=is_fast)) is not None:
        choose(query, value, terms, dropout_p, "auto", is_fast=is_fast)
        return Explanation("reference", {"hopper": reason, "triton": reason})
    return Explanation(
        *choose_kernel(
            make_operands(query, key, value, terms),
            "auto",
            scale=terms.scale,
            is_causal=terms.is_causal,
            is_fast=is_fast,
            needs_statistics=False,
        )
    )


def _check(call: AttentionCall, value: Tensor, dropout_p: float) -> LogitTerms:
    terms = logit_terms(call)
    check_value(call.key, value)
    check_dropout(dropout_p)
    return terms
