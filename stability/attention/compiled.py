"""Attention calls inside code that ``torch.compile`` compiles: an operator in the graph that shows them.

While a graph is traced, an attention call puts the operator before itself. Whenever the compiled code runs,
the operator hands the call's tensors to the watcher, in Python and outside of the graph. It returns nothing;
as an operator with an effect it is neither left out nor reordered, and breaks no graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stability.attention.call import AttentionCall, Mechanism
from stability.attention.seen import SeenAttention, UnseenAttentionError
from stability.effectful import keep_in_graphs

# Dynamos of older versions do not trace the module hooks that tell which layer is running.
IS_SUPPORTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class Place(NamedTuple):
    """Where in the program a call is made, as an observer names it while the graph is traced.

    Attributes:
        layer: Name of the layer.
        call: Which call of that layer.
    """

    layer: str
    call: int


class Watcher(Protocol):
    """Who wants to see the attention calls of compiled code."""

    def place(self) -> Place | None:
        """Where the call is that is being traced; None: it is not wanted. Traced itself."""
        ...

    def softmax_place(self, num_axes: int) -> Place | None:
        """The same of a softmax over the last of so many axes, if it is attention's."""
        ...

    def declared(self, place: Place) -> None:
        """The call has been declared by hand: a softmax of the same layer is not another. Traced itself."""
        ...

    def see(self, function: str, place: Place, call: AttentionCall) -> None:
        """Called whenever the compiled call runs."""
        ...

    def see_softmax(self, place: Place, logits: Tensor) -> None:
        """Called whenever the compiled softmax runs."""
        ...

    def cannot_see(self, function: str, layer: str, reason: str) -> None:
        """Called while the graph is traced, if a call cannot be seen in it."""
        ...


class Tracer:
    """Puts an operator before each attention call that is traced, for one watcher.

    Graphs outlive it; in one without its watcher the operator does nothing.
    """

    def __init__(self, watcher: Watcher) -> None:
        torch.compiler.assume_constant_result(_cannot_see)  # it runs while the graph is traced
        self._watcher = watcher
        self._number = next(_numbers)
        _watchers[self._number] = watcher

    def close(self) -> None:
        """Forgets the watcher."""
        _watchers.pop(self._number, None)

    def trace_call(
        self, function: str, read: Callable[..., SeenAttention], *args: Any, **kwargs: Any
    ) -> None:
        """Traces a call of a function whose arguments ``read`` understands."""
        place = self._watcher.place()
        if place is None:
            return
        try:
            seen = read(*args, **kwargs)
        except UnseenAttentionError as error:
            self.trace_unseen(function, place.layer, str(error))
            return
        if seen.row_logits is None:
            self._show(function, place, seen.call)
        else:
            self.trace_unseen(function, place.layer, _IS_FUNCTION)

    def trace_unseen(self, function: str, layer: str, reason: str) -> None:
        """Says, while the graph is traced, that a call cannot be seen in it."""
        _cannot_see(self._number, function, layer, reason)

    def trace_report(self, function: str, call: AttentionCall) -> None:
        """Traces a call that is declared by hand."""
        place = self._watcher.place()
        if place is not None:
            self._watcher.declared(place)
            self._show(function, place, call)

    def trace_softmax(self, logits: Tensor) -> None:
        """Traces a softmax that may be attention's."""
        place = self._watcher.softmax_place(logits.dim())
        if place is not None:
            torch.ops.stability.attention_logits(logits, self._number, place.layer, place.call)

    def _show(self, function: str, place: Place, call: AttentionCall) -> None:
        bias = call.bias
        torch.ops.stability.attention_call(
            call.query,
            call.key,
            call.attn_mask,
            _lengths(call.key_lengths),
            _lengths(call.query_lengths),
            bias if isinstance(bias, Tensor) else None,
            call.score_bias,
            None if isinstance(bias, Tensor) else bias,
            call.scale,
            call.is_causal,
            call.enable_gqa,
            call.mechanism,
            self._number,
            function,
            place.layer,
            place.call,
        )


_watchers: dict[int, Watcher] = {}
_numbers = itertools.count()

_IS_FUNCTION = "its mask or score modification is a function, which cannot be evaluated in compiled code"


def _cannot_see(number: int, function: str, layer: str, reason: str) -> None:
    _watchers[number].cannot_see(function, layer, reason)


def _lengths(lengths: Any) -> Tensor | None:
    return None if lengths is None else torch.as_tensor(lengths)


@torch.library.custom_op("stability::attention_call", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_call(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    bias: Tensor | None,
    score_bias: Tensor | None,
    bias_number: float | None,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    mechanism: str,
    number: int,
    function: str,
    layer: str,
    index: int,
) -> None:
    if number not in _watchers:
        return
    kind: Mechanism = "softmax" if mechanism == "softmax" else "sigmoid"
    call = AttentionCall(
        mechanism=kind,
        query=query,
        key=key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        # Compiled code gives a buffer to other values without a new version: an own tensor for each call.
        query_lengths=None if query_lengths is None else query_lengths.detach(),
        bias=bias_number if bias is None else bias,
        score_bias=score_bias,
    )
    _watchers[number].see(function, Place(layer, index), call)


@torch.library.custom_op("stability::attention_logits", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attention_logits(logits: Tensor, number: int, layer: str, index: int) -> None:
    if number in _watchers:
        _watchers[number].see_softmax(Place(layer, index), logits)


keep_in_graphs(_attention_call)
keep_in_graphs(_attention_logits)
