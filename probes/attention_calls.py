"""Statistics of every attention call the model makes, whatever computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from probes.activations import in_backward
from probes.module_calls import ModuleCalls
from probes.pending import Pending
from probes.record import Series
from stability.attention import AttentionCall
from stability.attention.interception import observe_attention
from stability.attention.statistics import attention_statistics


@dataclass(frozen=True)
class AttentionSite:
    """A place in the model where attention is computed.

    Attributes:
        layer: Innermost module that made the call.
        call: Which call of that module within a forward pass, from 0.
        mechanism: "softmax" or "sigmoid".
        num_heads: Query heads.
        query_shape: [batch, heads, tokens, head_dim] when first seen.
        key_shape: The same of the key.
    """

    layer: str
    call: int
    mechanism: str
    num_heads: int
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]


class AttentionCalls:
    """Measures attention calls made while a module of the model runs.

    Args:
        pending: Receives the scalars.
        module_calls: Knows which layer is running.
        selected: Layers that are watched.
        rows: Query rows sampled per sequence, or None for all.
        guard: Runs a named measurement so that its failure does not reach the model.
    """

    def __init__(
        self,
        pending: Pending,
        module_calls: ModuleCalls,
        selected: set[str],
        rows: int | None,
        guard: Callable[..., None],
    ) -> None:
        self.sites: dict[tuple[str, int], AttentionSite] = {}
        self.step: int | None = None  # optimizer step to measure; None: calls are only listed
        self._pending = pending
        self._module_calls = module_calls
        self._selected = selected
        self._rows = rows
        self._guard = guard
        self._calls: Counter[str] = Counter()

    def install(self, handles: ExitStack) -> None:
        """Starts observing; ends when ``handles`` closes."""
        handles.enter_context(observe_attention(self._see))

    def start_forward(self) -> None:
        """A forward pass of the whole model begins: calls of a layer are counted from 0 again."""
        self._calls.clear()

    def _see(self, call: AttentionCall) -> None:
        layer = self._module_calls.current_layer
        if layer is None or layer not in self._selected or not torch.is_grad_enabled():
            return
        if self._calls[layer] and in_backward():
            return  # activation checkpointing repeats the call; the first one counted
        index = self._calls[layer]
        self._calls[layer] += 1
        if (layer, index) not in self.sites:
            self.sites[layer, index] = AttentionSite(
                layer,
                index,
                call.mechanism,
                call.query.shape[1],
                tuple(call.query.shape),
                tuple(call.key.shape),
            )
        if self.step is not None:
            self._guard("attention", self._measure, layer, index, call, self.step)

    def _measure(self, layer: str, index: int, call: AttentionCall, step: int) -> None:
        # Each step has its own rows, the same ones in every run.
        statistics = attention_statistics(**vars(call), rows=self._rows, seed=step)
        for quantity, summary in statistics.summarize().items():
            series = Series(layer, f"attention/{quantity}", call=index, kind=summary.kind)
            self._pending.add(series, summary.value, summary.standard_error)
            self._pending.add(series, summary.per_head, summary.per_head_standard_error, per_head=True)
