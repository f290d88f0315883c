"""Statistics of every attention call the model makes, whatever computes it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from probes.delivery import ProbeWarning
from probes.pending import Pending
from probes.record import Series
from stability.attention.by_hand import is_attention_softmax, is_named_for_attention
from stability.attention.interception import observe_attention, observe_softmax
from stability.attention.seen import SeenAttention, UnseenAttentionError, seen_logits
from stability.module_calls import ModuleCalls, in_backward

REPORTED = "stability.attention.report_attention"
SOFTMAX = "torch.softmax"

_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")


@dataclass(frozen=True)
class AttentionSite:
    """A place in the model where attention is computed.

    Attributes:
        layer: Innermost module that made the call.
        call: Which call of that module within a forward pass, from 0.
        kind: Function that computes it; "torch.softmax" for attention written by hand, whose logits are seen.
        mechanism: "softmax" or "sigmoid"; None where unseen.
        num_heads: Query heads; None where unseen.
        query_shape: [batch, heads, tokens, head_dim] when first seen; head_dim is 0 where only the logits are
            seen. None where unseen.
        key_shape: The same of the key.
        unseen: Why nothing is recorded here; None where everything is seen.
    """

    layer: str
    call: int
    kind: str
    mechanism: str | None = None
    num_heads: int | None = None
    query_shape: tuple[int, ...] | None = None
    key_shape: tuple[int, ...] | None = None
    unseen: str | None = None


class AttentionCalls:
    """Measures attention calls made while a module of the model runs.

    Args:
        pending: Receives the scalars.
        module_calls: Knows which layer is running.
        selected: Layers that are watched.
        rows: Query rows sampled per sequence, or None for all.
        guard: Runs a named measurement so that its failure does not reach the model.

    Attributes:
        sites: Where attention is seen, by layer and number of the call.
        unseen: Where it is known to be and cannot be seen, by layer and function.
        step: Optimizer step to measure; None: calls are only listed.
        is_paused: Whether calls are the probe's own and not the model's.
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
        self.unseen: dict[tuple[str, str], AttentionSite] = {}
        self.step: int | None = None
        self.is_paused = False
        self._pending = pending
        self._module_calls = module_calls
        self._selected = selected
        self._rows = rows
        self._guard = guard
        self._calls: Counter[str] = Counter()
        self._modules = {name: module for module, name in module_calls.names.items()}
        # Layers named for attention of which no call is known; whatever is known takes them out.
        self._unexplained = {
            name
            for name, module in self._modules.items()
            if name in selected and is_named_for_attention(module)
        }
        self._reported: set[str] = set()

    def install(self, handles: ExitStack) -> None:
        """Starts observing; ends when ``handles`` closes."""
        handles.enter_context(observe_attention(self._see))
        handles.enter_context(observe_softmax(self._see_softmax))

    def start_forward(self) -> None:
        """A forward pass of the whole model begins: calls of a layer are counted from 0 again."""
        self._calls.clear()

    def end_module(self, layer: str) -> None:
        """A module has returned: if it is named for attention, some call should have been seen in it."""
        if layer in self._unexplained:
            kind = type(self._modules[layer]).__name__
            self._list_unseen(layer, kind, "it makes no attention call that is known, and no softmax")

    def _see(self, function: str, read: Callable[[], SeenAttention]) -> None:
        layer = self._module_calls.current_layer
        if layer is None or layer not in self._selected or self.is_paused or not torch.is_grad_enabled():
            return
        if function == REPORTED:
            self._reported.add(layer)
        self._look(layer, function, read)

    def _see_softmax(self, logits: Tensor) -> None:
        layer = self._module_calls.current_layer
        if layer is None or self.is_paused or not torch.is_grad_enabled():
            return
        if len(self._module_calls.running) > 1 and isinstance(self._modules[layer], nn.Softmax):
            layer = self._module_calls.running[-2]
        if layer not in self._selected or layer in self._reported:
            return
        if is_attention_softmax(self._modules[layer], logits):
            self._look(layer, SOFTMAX, partial(_read_softmax, self._modules[layer], logits))

    def _look(self, layer: str, function: str, read: Callable[[], SeenAttention]) -> None:
        if self._calls[layer] and in_backward():
            return  # activation checkpointing repeats the call; the first one counted
        index = self._calls[layer]
        is_listed = (layer, index) in self.sites
        if is_listed and self.step is None:
            self._calls[layer] += 1
            return
        try:
            seen = read()
            site = _site(layer, index, function, seen)
        except UnseenAttentionError as error:
            return self._list_unseen(layer, function, str(error))
        except Exception as error:  # arguments we cannot read must not stop a model that can
            return self._list_unseen(layer, function, f"its arguments cannot be read: {error!r}")
        self._calls[layer] += 1
        if 0 in seen.call.query.shape[:3] or 0 in seen.call.key.shape[:3]:
            return  # an empty batch
        if not is_listed or self.sites[layer, index].mechanism != site.mechanism:  # it was replaced since
            self.sites[layer, index] = site
            self._unexplained.difference_update(self._module_calls.running)
        if self.step is not None:
            self._guard("attention", self._measure, layer, index, seen, self.step)

    def _measure(self, layer: str, index: int, seen: SeenAttention, step: int) -> None:
        # Each step has its own rows, the same ones in every run.
        for quantity, summary in seen.statistics(self._rows, seed=step).summarize().items():
            series = Series(layer, f"attention/{quantity}", call=index, kind=summary.kind)
            self._pending.add(series, summary.value, summary.standard_error)
            self._pending.add(series, summary.per_head, summary.per_head_standard_error, per_head=True)

    def _list_unseen(self, layer: str, function: str, reason: str) -> None:
        self._unexplained.difference_update((*self._module_calls.running, layer))
        if (layer, function) in self.unseen:
            return
        self.unseen[layer, function] = AttentionSite(layer, self._calls[layer], function, unseen=reason)
        warnings.warn(
            f"attention in {layer} ({function}) is not seen: {reason}. "
            "stability.attention.report_attention declares what is computed by hand.",
            ProbeWarning,
            stacklevel=2,
        )


def _site(layer: str, index: int, function: str, seen: SeenAttention) -> AttentionSite:
    call = seen.call
    if call.query.dim() != 4 or call.key.dim() != 4:
        raise ValueError(
            f"query and key must be [batch, heads, tokens, head_dim]; got {tuple(call.query.shape)} "
            f"and {tuple(call.key.shape)}"
        )
    return AttentionSite(
        layer,
        index,
        function,
        call.mechanism,
        call.query.shape[1],
        tuple(call.query.shape),
        tuple(call.key.shape),
    )


def _read_softmax(module: nn.Module, logits: Tensor) -> SeenAttention:
    """Logits of a softmax with their heads apart: [batch, heads, tokens_q, tokens_k]."""
    heads = next((h for name in _HEADS_ATTRIBUTES if isinstance(h := getattr(module, name, None), int)), None)
    if logits.dim() == 3:  # [batch · heads, tokens_q, tokens_k], as for torch.bmm
        is_joined = heads is not None and heads > 0 and logits.shape[0] % heads == 0
        return seen_logits(logits.unflatten(0, (-1, heads)) if is_joined else logits.unsqueeze(1))
    if logits.dim() != 4 or (heads is not None and logits.shape[1] != heads):
        raise UnseenAttentionError(
            f"its softmax is over shape {tuple(logits.shape)}, not [batch, heads, tokens, tokens]"
            + ("" if heads is None else f" with the module's {heads} heads")
        )
    return seen_logits(logits)
