"""Size of every watched layer's output, the gradient that comes back to it, and the gain across the layer."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from probes.guard import GRADIENTS, size_at
from probes.pending import Pending
from probes.record import Series, series_of
from probes.sharding import Sharding
from stability.module_calls import in_backward
from stability.norms import max_abs, tensor_norm


class _Watched(NamedTuple):
    """A tensor whose gradient norm is measured, once, for every series that asks for it."""

    tensor: weakref.ref[Tensor]
    version: int  # tells an in-place change, after which the tensor has another gradient
    series: list[Series]


class Activations:
    """Measures the inputs and outputs of layers while a forward pass produces them.

    Gradients are read by ``Tensor.register_hook``, which leaves the graph as it is; module backward hooks
    insert nodes into it and break on in-place activations.

    Args:
        pending: Receives the scalars.
        guard: Runs a named measurement so that its failure does not reach the backward pass.
        sharding: Which part of an activation is here.

    Attributes:
        is_detailed: Whether largest entries are measured too.
    """

    def __init__(self, pending: Pending, guard: Callable[..., None], sharding: Sharding) -> None:
        self.is_detailed = False
        self._pending = pending
        self._guard = guard
        self._sharding = sharding
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._watched: dict[int, _Watched] = {}
        # Leaves (parameters, the user's inputs) outlive the graph: they are hooked once a step, since a hook
        # sees the backward pass of every micro-batch, and have to be unhooked again.
        self._leaves: dict[int, _Watched] = {}
        self._has_input: set[str] = set()
        self._leaf_hooks: list[RemovableHandle] = []
        self._place_of: dict[str, int] = {}
        self._is_out_of_order = False

    def start_forward(self) -> None:
        """A forward pass begins: calls of a layer are counted from 0 again."""
        self._calls.clear()
        self._has_input.clear()
        self._watched.clear()

    def end_step(self) -> None:
        """Lets go of everything the step's forward passes left."""
        self.start_forward()
        self._place_of.clear()
        self._is_out_of_order = False
        for handle in self._leaf_hooks:
            handle.remove()
        self._leaf_hooks.clear()
        self._leaves.clear()

    def note_place(self, layer: str) -> None:
        """Notes that a layer has returned, also where gradients are off.

        Reentrant checkpointing runs the forward pass without gradients, and the layers again, the last ones
        first, inside the backward pass. Only there are they measured.
        """
        self._place_of.setdefault(layer, len(self._place_of))

    def put_in_order(self) -> None:
        """Puts the outputs of the step into the order of the forward pass, which readers of it go by."""
        if self._is_out_of_order:
            self._pending.put_in_order("activation_rms", self._place_of)

    def see_input(self, layer: str, inputs: object) -> None:
        """Looks at a layer's first input before the layer runs and may change it in place."""
        self._has_input.discard(layer)
        tensor = next(floating_tensors(inputs), None)
        if tensor is None or not tensor.requires_grad or self._is_recomputed(layer):
            return
        if layer in self._sharding.split_inputs:
            return  # an ordinary tensor, of which nobody tells that it is a part
        self._watch(tensor, [series_of(layer, "_input_grad_norm", self._calls[layer])])
        self._has_input.add(layer)

    def see_output(self, layer: str, output: object) -> None:
        """Adds the size of a layer's first output, and of the gradient when it comes back."""
        tensor = next(floating_tensors(output), None)
        if tensor is None or tensor.numel() == 0 or self._is_recomputed(layer):
            return
        call = self._calls[layer]
        self._calls[layer] += 1
        self._is_out_of_order |= in_backward()
        self.measure_output(layer, call, tensor.detach())
        if tensor.requires_grad:
            has_input = layer in self._has_input
            self._watch(tensor, self.output_gradient_series(layer, call, has_input=has_input))

    def measure_output(self, layer: str, call: int, values: Tensor) -> None:
        """Adds the size of an output that is not attached to the graph."""
        # Ranks may communicate here: no failure of the arithmetic keeps one from it.
        values, _ = self._sharding.activation(values)
        if values.numel():  # otherwise another rank's samples
            self._guard(size_at(layer), self._add_size, layer, call, values)

    def _add_size(self, layer: str, call: int, values: Tensor) -> None:
        norm, size = tensor_norm(values), values.numel()
        self._pending.add(
            series_of(layer, "activation_rms", call), norm, factor=1 / math.sqrt(size), weight=size
        )
        if self.is_detailed:
            self._pending.add(series_of(layer, "activation_max_abs", call), max_abs(values))

    def output_gradient_series(self, layer: str, call: int, *, has_input: bool) -> list[Series]:
        """What the norm of the gradient at an output is recorded as.

        Args:
            layer: The layer.
            call: Which of its calls.
            has_input: Whether the gradient at the input of this call is measured too.
        """
        series = [series_of(layer, "activation_grad_norm", call)]
        if has_input:
            # Both sides of the ratio come from the same calls: others may have an input without gradient.
            at_input = series_of(layer, "_input_grad_norm", call)
            at_output = series_of(layer, "_output_grad_norm", call)
            series.append(at_output)
            self._pending.add_ratio(series_of(layer, "gradient_gain", call), at_input, at_output)
        return series

    def measure_gradient(self, gradient: Tensor, series: Iterable[Series]) -> None:
        """Adds the norm of a gradient under every name it has."""
        part, weight = self._sharding.activation(gradient)
        self._guard(GRADIENTS, self._add_norm, part, weight, series)

    def _add_norm(self, part: Tensor, weight: float, series: Iterable[Series]) -> None:
        norm = tensor_norm(part)
        for name in series:
            self._pending.add(name, norm, weight=weight)

    def _watch(self, tensor: Tensor, names: Iterable[Series]) -> None:
        """Records the norm of this tensor's gradient under these names too; hooks it when it is new."""
        known = self._leaves if tensor.is_leaf else self._watched
        watched = known.get(id(tensor))
        if (
            watched is None
            or watched.tensor() is not tensor
            or (watched.version != tensor._version and not tensor.is_leaf)  # a leaf keeps its gradient
        ):
            watched = known[id(tensor)] = self._hook(tensor)
        watched.series.extend(name for name in names if name not in watched.series)

    def _hook(self, tensor: Tensor) -> _Watched:
        series: list[Series] = []

        def hook(gradient: Tensor | None) -> None:
            # None: of a call's several outputs (`chunk`, `unbind`), the loss does not depend on this one.
            if gradient is not None:
                self.measure_gradient(gradient, series)

        handle = tensor.register_hook(hook)
        if tensor.is_leaf:
            self._leaf_hooks.append(handle)
        return _Watched(weakref.ref(tensor), tensor._version, series)

    def _is_recomputed(self, layer: str) -> bool:
        """Activation checkpointing runs a layer again inside the backward pass; its first run counts."""
        return self._calls[layer] > 0 and in_backward()


def floating_tensors(value: object) -> Iterator[Tensor]:
    """The real floating-point tensors in what a module takes or returns, in order.

    Tuples, lists and mappings (a Hugging Face ``ModelOutput`` is one) are searched.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_sparse:
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floating_tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
