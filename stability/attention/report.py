"""How code that computes attention by hand declares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stability.attention.call import AttentionCall, Mechanism

Observer = Callable[[AttentionCall], None]

_observers: list[tuple[Observer, Observer]] = []


def report_attention(
    query: Tensor,
    key: Tensor,
    *,
    mechanism: Mechanism = "softmax",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | Sequence[int] | None = None,
    query_lengths: Tensor | Sequence[int] | None = None,
    bias: float | Tensor | None = None,
    score_bias: Tensor | None = None,
) -> None:
    """Declares an attention computation, so that probes see it. Computes nothing; without probes, no-op.

    For attention that is neither one of the functions that are seen anyway nor a softmax: a custom kernel, a
    sigmoid written by hand. Call it in the module's ``forward`` before the computation. A softmax of the same
    module is then not taken for attention of its own. Probes check the arguments: with wrong ones the site is
    listed as unseen, and the model runs on.

    Args:
        query: [batch, heads, tokens_q, head_dim], floating point.
        key: [batch, heads, tokens_k, head_dim]; fewer heads with `enable_gqa`.
        mechanism: "softmax" or "sigmoid".
        attn_mask: Boolean (True takes part) or added to the logits, as position biases are; broadcastable to
            [batch, heads, tokens_q, tokens_k].
        is_causal: Query i sees the keys j ≤ i.
        scale: Factor of q·k. None means 1/√head_dim.
        enable_gqa: Whether groups of query heads share a key head.
        key_lengths: [batch] numbers of valid keys.
        query_lengths: [batch] numbers of valid queries.
        bias: Sigmoid only; None means −ln(max(key_lengths, 1)).
        score_bias: Sigmoid only; [tokens_k] or [batch, tokens_k].

    Example:
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> with observe_reports(lambda call: print(call.mechanism, tuple(call.query.shape))):
        ...     report_attention(x, x, mechanism="sigmoid")
        sigmoid (1, 2, 3, 4)
    """
    if not _observers:
        return
    call = AttentionCall(
        mechanism=mechanism,
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
    for observer, trace in tuple(_observers):
        if torch.compiler.is_compiling():
            trace(call)
        else:
            observer(call)


@contextmanager
def observe_reports(observer: Observer, trace: Observer = lambda call: None) -> Iterator[None]:
    """Calls ``observer`` with every reported call while the context is open.

    Where ``torch.compile`` traces the call, ``trace`` is called in its stead and traced itself.
    """
    _observers.append((observer, trace))
    try:
        yield
    finally:
        _observers.remove((observer, trace))
