"""Layers inside code that ``torch.compile`` compiles: an operator in the graph that shows their tensors.

While a forward pass is traced, the operator is put behind each watched layer, and by tensor hooks, which
dynamo traces into the backward graph, on its gradients. When the compiled code runs it hands the tensor to
the probe, in Python and outside of the graph. `stability.attention.compiled` does the same for attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from probes.activations import floating_tensors
from stability.effectful import keep_in_graphs

What = Literal["output", "gradient at output", "gradient at output, with input", "gradient at input"]
Receiver = Callable[[What, str, int, Tensor], None]

_receivers: dict[int, Receiver] = {}
_numbers = itertools.count()


class CompiledLayers:
    """Traces what is watched of layers, for one receiver. Graphs outlive it and then show nothing.

    The methods ``trace_...`` are traced themselves.

    Args:
        layers: Layers whose outputs are watched.
        receiver: Called whenever compiled code runs, with what the tensor is, the layer, which of its calls,
            and the tensor.

    Attributes:
        is_compiled: Whether there is compiled code that shows layers.
    """

    def __init__(self, layers: set[str], receiver: Receiver) -> None:
        self.is_compiled = False
        self._layers = layers
        self._receiver = receiver
        self._number = next(_numbers)
        _receivers[self._number] = self._receive
        self._calls: dict[str, int] = {}
        self._has_input: dict[str, bool] = {}

    def close(self) -> None:
        """Forgets the receiver."""
        _receivers.pop(self._number, None)

    def _receive(self, what: What, layer: str, call: int, tensor: Tensor) -> None:
        self.is_compiled = True
        self._receiver(what, layer, call, tensor)

    def trace_start(self, layer: str, inputs: object) -> None:
        """Puts the gradient at a layer's first input into the graph."""
        if layer not in self._layers:
            return
        tensor = next(floating_tensors(inputs), None)
        self._has_input[layer] = tensor is not None and tensor.requires_grad
        if tensor is not None and tensor.requires_grad:
            _show_gradient(tensor, self._number, "gradient at input", layer, self._calls.get(layer, 0))

    def trace_return(self, layer: str, output: object) -> None:
        """Puts a layer's first output, and the gradient there, into the graph."""
        tensor = next(floating_tensors(output), None)
        if layer not in self._layers or tensor is None:
            return
        call = self._calls.get(layer, 0)
        self._calls[layer] = call + 1
        torch.ops.probes.show(tensor, self._number, "output", layer, call)
        if tensor.requires_grad:
            what = "gradient at output, with input" if self._has_input[layer] else "gradient at output"
            _show_gradient(tensor, self._number, what, layer, call)

    def trace_end(self) -> None:
        """What is compiled has been traced: nothing may be left that other graphs would be guarded by."""
        self._calls.clear()
        self._has_input.clear()


def _show_gradient(tensor: Tensor, number: int, what: str, layer: str, call: int) -> None:
    def hook(gradient: Tensor | None) -> None:
        torch.ops.probes.show_gradient(gradient, number, what, layer, call)

    tensor.register_hook(hook)


@torch.library.custom_op("probes::show", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _show(tensor: Tensor, number: int, what: str, layer: str, call: int) -> None:
    if number in _receivers:
        (known,) = (known for known in get_args(What) if known == what)
        _receivers[number](known, layer, call, tensor)


keep_in_graphs(_show)


# A gradient is None at an output that the loss does not depend on. A traced hook cannot ask for that, and
# inductor frees a tensor too early around an operator that is given None alone. Being composite, this one is
# taken apart while the backward graph is traced, and leaves nothing there for None.
torch.library.define(
    "probes::show_gradient", "(Tensor? gradient, int number, str what, str layer, int call) -> ()"
)


@torch.library.impl("probes::show_gradient", "CompositeImplicitAutograd")
def _show_gradient_if_any(gradient: Tensor | None, number: int, what: str, layer: str, call: int) -> None:
    if gradient is not None:
        torch.ops.probes.show(gradient, number, what, layer, call)
