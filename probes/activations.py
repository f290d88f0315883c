"""Size of every watched layer's output, the gradient that comes back to it, and the gain across the layer."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from probes.pending import Pending
from probes.record import Series
from stability.norms import max_abs, tensor_norms


class Activations:
    """Measures the inputs and outputs of layers while a forward pass produces them.

    Gradients are read by ``Tensor.register_hook``, which leaves the graph as it is; module backward hooks
    insert nodes into it and break on in-place activations.
    """

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._calls: Counter[str] = Counter()
        # Where the gradient norm at a tensor is already measured: one layer's output is the next one's input.
        # The version tells whether the tensor was changed in place since.
        self._measured: dict[int, tuple[weakref.ref[Tensor], int, Series]] = {}
        self._at_input: dict[str, Series] = {}

    def start_forward(self) -> None:
        """A forward pass of the whole model begins: calls of a layer are counted from 0 again."""
        self._calls.clear()
        self._at_input.clear()
        self._measured.clear()

    @torch.no_grad()
    def see_input(self, layer: str, inputs: object) -> None:
        """Looks at a layer's first input before the layer runs and may change it in place."""
        tensor = next(floating_tensors(inputs), None)
        if tensor is None or not tensor.requires_grad or self._is_recomputed(layer):
            return
        reference, version, series = self._measured.get(id(tensor), (None, None, None))
        if series is None or reference is None or reference() is not tensor or version != tensor._version:
            series = Series(layer, "_input_grad_norm", call=self._calls[layer])
            self._measure_gradient(tensor, series)
        self._at_input[layer] = series

    @torch.no_grad()
    def see_output(self, layer: str, output: object) -> None:
        """Adds the size of a layer's first output, and of the gradient when it comes back."""
        tensor = next(floating_tensors(output), None)
        if tensor is None or tensor.numel() == 0 or self._is_recomputed(layer):
            return
        call = self._calls[layer]
        self._calls[layer] += 1
        values = tensor.detach()
        (norm,) = tensor_norms([values])
        self._pending.add(Series(layer, "activation_rms", call=call), norm / math.sqrt(values.numel()))
        self._pending.add(Series(layer, "activation_max_abs", call=call), max_abs(values))
        if tensor.requires_grad:
            at_output = Series(layer, "activation_grad_norm", call=call)
            self._measure_gradient(tensor, at_output)
            at_input = self._at_input.pop(layer, None)
            if at_input is not None:
                self._pending.add_ratio(Series(layer, "gradient_gain", call=call), at_input, at_output)

    def _measure_gradient(self, tensor: Tensor, series: Series) -> None:
        pending = self._pending

        @torch.no_grad()
        def measure(gradient: Tensor) -> None:
            pending.add(series, tensor_norms([gradient.detach()])[0])

        tensor.register_hook(measure)
        self._measured[id(tensor)] = (weakref.ref(tensor), tensor._version, series)

    def _is_recomputed(self, layer: str) -> bool:
        """Activation checkpointing runs a layer again inside the backward pass; its first run counts."""
        return self._calls[layer] > 0 and in_backward()


def in_backward() -> bool:
    """Whether autograd is running the backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def floating_tensors(value: object) -> Iterator[Tensor]:
    """The real floating-point tensors in what a module takes or returns, in order.

    Tuples, lists and mappings (a Hugging Face ``ModelOutput`` is one) are searched.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_sparse:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from floating_tensors(item)
