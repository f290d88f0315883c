"""Measurements that fail are given up, and what is then missing of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection

from probes.failures import ProbeWarning
from probes.pending import Pending
from probes.record import Series

GRADIENTS, WEIGHTS, UPDATES = "gradients", "weights", "updates"
OTHER_OPTIMIZERS = "other optimizers"
ATTENTION, JACOBIANS = "attention", "layer Jacobians"

_MEASURED_WITH = {
    "grad_norm": GRADIENTS,
    "_other_grad_norm": GRADIENTS,
    "grad_max_abs": GRADIENTS,
    "nonfinite_count": GRADIENTS,
    "activation_grad_norm": GRADIENTS,
    "_input_grad_norm": GRADIENTS,
    "_output_grad_norm": GRADIENTS,
    "weight_norm": WEIGHTS,
    "_update_norm": UPDATES,
    "_adam_update_norm": UPDATES,
    "_root_size": UPDATES,
    "attention": ATTENTION,
    "layer_jacobian": JACOBIANS,
}
_AT_OUTPUTS = ("activation_rms", "activation_max_abs", "activation_grad_norm", "_output_grad_norm")
# Both sides of a gain: a call whose input was not seen does not enter it.
_WITH_INPUTS = ("_input_grad_norm", "_output_grad_norm")


class Guard:
    """Runs measurements so that one that fails does not reach the training, and is not tried again.

    Args:
        pending: Told what is given up.

    Attributes:
        step: The step under way.
    """

    def __init__(self, pending: Pending) -> None:
        self.step = 0
        self._pending = pending
        self._warned: set[str] = set()

    def __call__(
        self, what: str, measure: Callable[..., None], *arguments: object, **options: object
    ) -> None:
        """Runs a measurement; one that fails is given up with a warning, the training goes on."""
        if what in self._pending.given_up:
            return
        try:
            measure(*arguments, **options)
        except Exception as error:
            self._pending.given_up |= {what}
            self.warn_once(
                what,
                f"measuring {what} failed at step {self.step} and is given up; training goes on: {error!r}",
            )

    def warn_once(self, what: str, message: str) -> None:
        """Warns of something, the first time."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, ProbeWarning, stacklevel=3)


def inputs_of(layer: str) -> str:
    """Name of the measurement of a layer's inputs."""
    return f"inputs of {layer}"


def outputs_of(layer: str) -> str:
    """Name of the measurement of a layer's outputs."""
    return f"outputs of {layer}"


def size_at(layer: str) -> str:
    """Name of the arithmetic in it."""
    return f"the size of outputs of {layer}"


def is_lost(series: Series, given_up: Collection[str]) -> bool:
    """Whether a series is missing, or incomplete, since a measurement was given up."""
    if not given_up:
        return False
    layer, quantity = series.layer, series.quantity
    if quantity in _AT_OUTPUTS and outputs_of(layer) in given_up:
        return True
    if quantity in _WITH_INPUTS and inputs_of(layer) in given_up:
        return True
    if quantity in ("activation_rms", "activation_max_abs"):
        return size_at(layer) in given_up
    return _MEASURED_WITH.get(quantity.partition("/")[0]) in given_up
