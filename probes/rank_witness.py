"""Each rank's own gradient at the first block, before it is mixed with the other ranks'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from probes.activations import floating_tensors
from probes.record import ALL_LAYERS, Series
from stability.module_calls import in_backward

FIRST_GRADIENT_NORM = Series(ALL_LAYERS, "_first_gradient_norm")


class RankWitness:
    """Looks at the gradient at the first block's input, or at its output where the input has none.

    Every NaN that a backward pass meets, or starts from, arrives there, on the rank where it arose and on no
    other: gradients of parameters are summed over the ranks before the optimizer has them. It needs a hook on
    the module itself, since process-wide hooks would slow down every step; copies of the module, and what is
    pickled of it, carry a function that does nothing.

    Args:
        block: The model's first.
        see: Called with the gradient.
    """

    def __init__(self, block: nn.Module, see: Callable[[Tensor], None]) -> None:
        self._block = block
        self._see = see
        self._has_input = False

    def install(self, handles: ExitStack) -> None:
        """Hooks the block; ends when ``handles`` closes."""
        before = self._block.register_forward_pre_hook(_Hook(self._before), with_kwargs=True)
        after = self._block.register_forward_hook(_Hook(self._after))
        handles.callback(before.remove)
        handles.callback(after.remove)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._has_input = self._watch((args, kwargs))

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        if not self._has_input:
            self._watch(output)

    def _watch(self, tensors: object) -> bool:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_backward():
            return True  # and the output is not looked at either
        tensor = next((t for t in floating_tensors(tensors) if t.requires_grad and not t.is_leaf), None)
        if tensor is not None:
            tensor.register_hook(self._see)
        return tensor is not None


class _Hook:
    """A module hook that is left behind when the module is copied or pickled."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: object) -> None:
        self._function(*args)

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple[Callable[..., object], tuple]:
        return _left_behind, ()


def _left_behind() -> Callable[..., None]:
    return _no_hook


def _no_hook(*args: object) -> None:
    """What copies of a watched module carry."""
