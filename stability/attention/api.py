"""The two attention functions users call, and the one place from which calls can be observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from stability.attention import reference
from stability.attention.call import AttentionCall
from stability.attention.validation import check_dropout, check_value, logit_terms

Observer = Callable[[AttentionCall], None]

SIGMOID_IMPLEMENTATIONS = {"reference": reference.sigmoid_attention}

_observers: list[tuple[Observer, Observer | None]] = []


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
) -> Tensor:
    """Scaled dot-product attention with torch's meanings, and padding given by lengths.

    Formula: softmax(scale · Q Kᵀ + attn_mask) V, each row over its allowed keys. A row without an allowed key
    gives zeros. Logits and weights are float32 (float64 for float64 inputs); the weights are rounded to the
    value's dtype for the second product. Under autocast query, key and value are cast first, as torch does.

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

    Returns:
        [batch, heads, tokens_q, value_dim].

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value or device.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    Example:
        >>> query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.eye(3)[None, None]
        >>> softmax_attention(query, key, value, key_lengths=[2])
        tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """
    query, key, value = _cast_under_autocast(query, key, value)
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
    return _compute(reference.softmax_attention, call, value, dropout_p)


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
    implementation: str = "auto",
) -> Tensor:
    """Sigmoid attention: every weight is decided on its own, without normalisation over the keys.

    Formula: σ(scale · Q Kᵀ + attn_mask + score_bias + bias) V. The default bias −ln n makes the weights of a
    row sum to about 1 where the logits are near 0. Precision and autocast as in :func:`softmax_attention`.

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
        implementation: "auto" or "reference"; "auto" is the reference.

    Returns:
        [batch, heads, tokens_q, value_dim].

    Raises:
        TypeError: A wrong type or dtype.
        ValueError: A wrong shape, value, device or implementation.

    Source:
        Ramapuram et al. 2024 (arXiv 2409.04431), which also gives the bias −ln n.

    Example:
        >>> query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.eye(3)[None, None]
        >>> sigmoid_attention(query, key, value, key_lengths=[2])
        tensor([[[[0.3333, 0.3333, 0.0000]]]])
    """
    if implementation != "auto" and implementation not in SIGMOID_IMPLEMENTATIONS:
        valid = ", ".join(repr(name) for name in ("auto", *SIGMOID_IMPLEMENTATIONS))
        raise ValueError(f"`implementation` must be one of {valid}; got {implementation!r}.")
    query, key, value = _cast_under_autocast(query, key, value)
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
    chosen = "reference" if implementation == "auto" else implementation
    return _compute(SIGMOID_IMPLEMENTATIONS[chosen], call, value, dropout_p)


@contextmanager
def observe(callback: Observer, trace: Observer | None = None) -> Iterator[None]:
    """Calls `callback` before every attention computation while the context is open.

    The callback sees valid calls of this process only, on the thread that makes them. It must not change the
    tensors; what it raises reaches the caller of the attention function.

    Args:
        callback: Receives the :class:`AttentionCall`.
        trace: Receives it in the callback's stead where ``torch.compile`` traces the call; traced itself.

    Yields:
        Nothing.

    Example:
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> with observe(lambda call: print(call.mechanism, tuple(call.query.shape))):
        ...     _ = sigmoid_attention(x, x, x)
        sigmoid (1, 2, 3, 4)
    """
    _observers.append((callback, trace))
    try:
        yield
    finally:
        _observers.remove((callback, trace))


def _compute(
    implementation: Callable[..., Tensor], call: AttentionCall, value: Tensor, dropout_p: float
) -> Tensor:
    terms = logit_terms(call)
    check_value(call.key, value)
    check_dropout(dropout_p)
    for callback, trace in tuple(_observers):
        if not torch.compiler.is_compiling():
            callback(call)
        elif trace is not None:
            trace(call)
    # The inputs already have autocast's dtype; the logits have to stay float32.
    device_type = call.query.device.type
    is_autocast = _is_autocast(device_type)
    with torch.autocast(device_type, enabled=False) if is_autocast else nullcontext():
        return implementation(call.query, call.key, value, terms, dropout_p)


def _cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The cast torch makes before its own attention: half and float32 tensors, not float64."""
    return tuple(
        tensor.to(torch.get_autocast_dtype(tensor.device.type))
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and _is_autocast(tensor.device.type)
        else tensor
        for tensor in tensors
    )


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
