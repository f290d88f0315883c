"""Statistics of every attention call the model makes, whatever computes it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probes.attention_sites import AttentionSite, attention_site, read_softmax
from probes.failures import ProbeWarning
from probes.guard import ATTENTION
from probes.pending import Pending
from probes.record import Series
from probes.sharding import Sharding
from stability.attention.by_hand import is_attention_softmax, is_named_for_attention
from stability.attention.call import AttentionCall
from stability.attention.compiled import Place, Tracer
from stability.attention.interception import observe_attention, observe_softmax
from stability.attention.rows import RowSelection
from stability.attention.seen import SeenAttention, UnseenAttentionError
from stability.attention.statistics import AttentionStatistics
from stability.attention.summary import Quantity, summarize_calls
from stability.module_calls import ROOT_LAYER, ModuleCalls, in_backward, is_mapped

_NO_CALL = "it makes no attention call that is known, and no softmax"
_NO_COMPILED_CALL = (
    "no attention call of it is known in compiled code, where a softmax has to be written torch.softmax(x) "
    "and not x.softmax()"
)

REPORTED = "stability.attention.report_attention"
SOFTMAX = "torch.softmax"

# Rows of which statistics wait to be summarised: 16 MiB of them, in float32.
_MAX_WAITING_ROWS = 2**19


class _Waiting(NamedTuple):
    """Rows of a call that have been measured and not yet summarised; on what stream of CUDA, if any."""

    stream: torch.cuda.Stream | None
    place: Place
    first_head: int
    statistics: AttentionStatistics


class AttentionCalls:
    """Measures attention calls made while a module of the model runs.

    Each call's rows are measured when it is made, and summarised together with those of the step's other
    calls: launching a summary for each of them would take longer than computing it.

    Args:
        pending: Receives the scalars.
        module_calls: Knows which layer is running.
        selected: Layers that are watched.
        rows: Query rows sampled per sequence, or None for all.
        guard: Runs a named measurement so that its failure does not reach the model.
        sharding: Which samples and heads are here.

    Attributes:
        sites: Where attention is seen, by layer and number of the call.
        unseen: Where it is known to be and cannot be seen, by layer and function.
        step: Optimizer step to measure; None: calls are only listed.
        is_paused: Whether calls are the probe's own and not the model's.
        is_compiled: Whether there is compiled code that shows calls.
        tracer: Puts calls into compiled graphs.
    """

    def __init__(
        self,
        pending: Pending,
        module_calls: ModuleCalls,
        selected: set[str],
        rows: int | None,
        guard: Callable[..., None],
        sharding: Sharding,
    ) -> None:
        self.sites: dict[Place, AttentionSite] = {}
        self.unseen: dict[tuple[str, str], AttentionSite] = {}
        self.step: int | None = None
        self.is_paused = False
        self.is_compiled = False
        self._pending = pending
        self._module_calls = module_calls
        self._selected = selected
        self._rows = rows
        self._guard = guard
        self._sharding = sharding
        self._calls: Counter[str] = Counter()
        self._modules = {name: module for module, name in module_calls.names.items()}
        self._softmax_modules = {n for n, module in self._modules.items() if isinstance(module, nn.Softmax)}
        # Layers named for attention, and those of which no call is known; what is known takes them out.
        self._named_for_attention = {
            name: type(module).__name__
            for name, module in self._modules.items()
            if name in selected and is_named_for_attention(module)
        }
        self._unexplained = set(self._named_for_attention)
        self._reported: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._num_waiting_rows = 0
        self._select_anew()
        self.tracer = Tracer(self)
        self._traced_calls: dict[str, int] = {}
        self._traced_within: dict[str, bool] = {}
        self._traced_declared: dict[str, bool] = {}

    def install(self, handles: ExitStack) -> None:
        """Starts observing; ends when ``handles`` closes."""
        handles.callback(self.tracer.close)
        handles.enter_context(observe_attention(self._see, self.tracer))
        handles.enter_context(observe_softmax(self._see_softmax))

    def begin_step(self, step: int | None) -> None:
        """A step begins whose calls are measured; None: are only listed."""
        self.step = step
        self._take_waiting()
        self._select_anew()

    def start_forward(self) -> None:
        """A forward pass of the whole model begins: calls of a layer are counted from 0 again."""
        self._calls.clear()
        self._select_anew()

    def summarize(self) -> None:
        """Adds what the calls so far have measured to the step's scalars.

        Nothing once a measurement has failed: attention is given up then, that of this step included.
        """
        if waiting := self._take_waiting():
            self._guard(ATTENTION, self._add, waiting)

    def end_module(self, layer: str) -> None:
        """A module has returned: if it is named for attention, some call should have been seen in it."""
        if layer in self._unexplained:
            self.cannot_see(type(self._modules[layer]).__name__, layer, _NO_CALL)

    # The same while torch.compile traces a forward pass, traced itself: plain loops, lists and dictionaries,
    # which are empty whenever no forward pass is under way, so that graphs are not compiled again for them.

    def trace_start(self, layer: str, args: tuple) -> None:
        """See :class:`~stability.module_calls.ModuleTracer`."""

    def trace_return(self, layer: str, output: object) -> None:
        """See :class:`~stability.module_calls.ModuleTracer`."""
        if layer in self._named_for_attention and layer not in self._traced_within:
            self.tracer.trace_unseen(self._named_for_attention[layer], layer, _NO_COMPILED_CALL)

    def trace_end(self) -> None:
        """What is compiled has been traced."""
        self._traced_calls.clear()
        self._traced_within.clear()
        self._traced_declared.clear()

    def place(self) -> Place | None:
        """See :class:`~stability.attention.compiled.Watcher`."""
        layer = self._module_calls.current_layer
        if layer is None or layer not in self._selected or not torch.is_grad_enabled():
            return None
        return self._place_in(layer)

    def softmax_place(self, num_axes: int) -> Place | None:
        """See :class:`~stability.attention.compiled.Watcher`."""
        layer = self._layer_of_softmax(num_axes)
        return None if layer is None or layer in self._traced_declared else self._place_in(layer)

    def declared(self, place: Place) -> None:
        """See :class:`~stability.attention.compiled.Watcher`."""
        self._traced_declared[place.layer] = True

    def see(self, function: str, place: Place, call: AttentionCall) -> None:
        """See :class:`~stability.attention.compiled.Watcher`."""
        self.is_compiled = True
        if not in_backward():  # activation checkpointing repeats the call
            self._look_at(place, function, lambda: SeenAttention(call))

    def see_softmax(self, place: Place, logits: Tensor) -> None:
        """See :class:`~stability.attention.compiled.Watcher`."""
        self.is_compiled = True
        if not in_backward():
            self._look_at(place, SOFTMAX, partial(read_softmax, self._modules[place.layer], logits))

    def cannot_see(self, function: str, layer: str, reason: str) -> None:
        """See :class:`~stability.attention.compiled.Watcher`."""
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

    def _place_in(self, layer: str) -> Place:
        index = self._traced_calls.get(layer, 0)
        self._traced_calls[layer] = index + 1
        for name in self._module_calls.running:
            self._traced_within[name] = True
        return Place(layer, index)

    def _layer_of_softmax(self, num_axes: int) -> str | None:
        """The layer whose attention a softmax over the last of so many axes is; None: of none."""
        layer = self._module_calls.current_layer
        if layer is None or not torch.is_grad_enabled():
            return None
        if layer in self._softmax_modules and len(self._module_calls.running) > 1:
            layer = self._module_calls.running[-2]
        if layer not in self._selected:
            return None
        is_attention = is_attention_softmax(num_axes, is_named=layer in self._named_for_attention)
        return layer if is_attention else None

    def _see(self, function: str, read: Callable[[], SeenAttention]) -> None:
        layer = self._module_calls.current_layer
        if layer is None or layer not in self._selected or self.is_paused or not torch.is_grad_enabled():
            return
        if is_mapped():
            return
        if function == REPORTED:
            self._reported.add(layer)
        self._look(layer, function, read)

    def _see_softmax(self, logits: Tensor) -> None:
        layer = None if self.is_paused or is_mapped() else self._layer_of_softmax(logits.dim())
        if layer is not None and layer not in self._reported:
            self._look(layer, SOFTMAX, partial(read_softmax, self._modules[layer], logits))

    def _look(self, layer: str, function: str, read: Callable[[], SeenAttention]) -> None:
        if self._calls[layer] and in_backward():
            return  # activation checkpointing repeats the call; the first one counted
        self._calls[layer] += self._look_at(Place(layer, self._calls[layer]), function, read)

    def _look_at(self, place: Place, function: str, read: Callable[[], SeenAttention]) -> bool:
        """Lists the call, and measures it if that is due; returns whether it is seen."""
        is_listed = place in self.sites
        if is_listed and self.step is None:
            return True
        try:
            seen = read()
            site = attention_site(place, function, seen)
        except UnseenAttentionError as error:
            self.cannot_see(function, place.layer, str(error))
            return False
        except Exception as error:  # arguments we cannot read must not stop a model that can
            self.cannot_see(function, place.layer, f"its arguments cannot be read: {error!r}")
            return False
        if not is_listed or self.sites[place].mechanism != site.mechanism:  # it was replaced since
            self.sites[place] = site
            self._unexplained.difference_update(self._module_calls.running)
            self._unexplained -= {name for name in self._unexplained if _contains(name, place.layer)}
        is_empty = 0 in seen.call.query.shape[:3] or 0 in seen.call.key.shape[:3]
        if self.step is not None and not is_empty:
            self._guard(ATTENTION, self._measure, place, seen)
        return True

    def _measure(self, place: Place, seen: SeenAttention) -> None:
        batch, num_heads = seen.call.query.shape[:2]
        first_sample = self._sharding.first_sample(batch)
        first_head = self._sharding.first_head(place.layer, num_heads)
        statistics = seen.statistics(self._row_selection, first_sample)
        device = statistics.max_logit.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._waiting.append(_Waiting(stream, place, first_head, statistics))
        self._num_waiting_rows += statistics.max_logit.numel()
        # By the end of a step a model has joined its streams; before that each may read its own rows alone.
        if self._num_waiting_rows >= _MAX_WAITING_ROWS and all(w.stream == stream for w in self._waiting):
            self.summarize()

    def _take_waiting(self) -> list[_Waiting]:
        waiting, self._waiting, self._num_waiting_rows = self._waiting, [], 0
        return waiting

    def _add(self, waiting: Sequence[_Waiting]) -> None:
        summaries = summarize_calls([each.statistics for each in waiting])
        for (_, place, first_head, statistics), summary in zip(waiting, summaries, strict=True):
            heads = range(first_head, first_head + statistics.max_logit.shape[1])
            self._pending.add_each(_names(place, summary.of_maxima, heads), summary.maxima)
            names = _names(place, summary.of_means, heads)
            self._pending.add_each(names, summary.means, summary.standard_errors, weight=summary.counts)

    def _select_anew(self) -> None:
        # Each step has its own rows, the same ones in every run, on however many processes.
        self._row_selection = RowSelection(self._rows, seed=self.step or 0)


@lru_cache(maxsize=2**12)
def _names(place: Place, quantities: tuple[Quantity, ...], heads: range) -> tuple[Series, ...]:
    """Of each quantity the layer's series and then one a head."""
    return tuple(
        Series(place.layer, f"attention/{name}", head=head, call=place.call, kind=kind)
        for name, kind in quantities
        for head in (None, *heads)
    )


def _contains(name: str, layer: str) -> bool:
    return name in (layer, ROOT_LAYER) or layer.startswith(f"{name}.")
