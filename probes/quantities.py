"""Every recorded quantity: what it is, its unit, and how several measurements in one step become one.

A step holds several measurements of one quantity of one layer when a layer has several parameters or when
gradients are accumulated over several forward passes. The reduction says how they join.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Reduction = Callable[[Sequence[float]], float]


def root_sum_of_squares(values: Sequence[float]) -> float:
    """Euclidean norm of the parts' norms."""
    return math.hypot(*values) if all(map(math.isfinite, values)) else sum(map(abs, values))


def largest(values: Sequence[float]) -> float:
    """Maximum; NaN if any part is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def root_mean_square(values: Sequence[float]) -> float:
    """Square root of the mean square."""
    return root_sum_of_squares(values) / math.sqrt(len(values))


def total(values: Sequence[float]) -> float:
    """Sum."""
    return sum(values)


class Quantity(NamedTuple):
    """How a quantity is read.

    Attributes:
        reduction: Joins several measurements of one step.
        unit: Physical unit, or "1" for pure numbers.
        meaning: One line for people.
    """

    reduction: Reduction
    unit: str
    meaning: str


QUANTITIES: dict[str, Quantity] = {
    "grad_norm": Quantity(
        root_sum_of_squares, "loss per weight", "Norm of the gradient the optimizer receives"
    ),
    "grad_max_abs": Quantity(largest, "loss per weight", "Largest absolute entry of that gradient"),
    "nonfinite_count": Quantity(total, "entries", "NaN and infinite entries of that gradient"),
    "skipped_step": Quantity(
        largest, "1", "1 where a GradScaler or on_divergence left the update out; otherwise 0, or absent"
    ),
    "weight_norm": Quantity(root_sum_of_squares, "weight", "Norm of the weights before the step"),
    "update_ratio": Quantity(mean, "1", "Norm of the step's change over weight_norm; about 1e-3 is usual"),
    "adam_update_rms": Quantity(
        mean, "1", "sqrt(mean(g²/v)) of Adam's second moment v; above about 2.3 precedes loss spikes"
    ),
    "activation_rms": Quantity(root_mean_square, "activation", "Root mean square of the layer's output"),
    "activation_max_abs": Quantity(largest, "activation", "Largest absolute entry of the layer's output"),
    "activation_grad_norm": Quantity(
        root_sum_of_squares, "loss per activation", "Norm of the gradient at the layer's output"
    ),
    "gradient_gain": Quantity(mean, "1", "Gradient norm at the layer's input over that at its output"),
    "layer_jacobian/spectral": Quantity(mean, "1", "Spectral norm of ∂output/∂input of the whole layer"),
    "layer_jacobian/frobenius": Quantity(mean, "1", "Frobenius norm of ∂output/∂input of the whole layer"),
    "attention/max_logit": Quantity(largest, "logit", "Largest attention logit, over rows"),
    "attention/entropy": Quantity(mean, "nats", "Entropy of an attention row, mean over rows"),
    "attention/jacobian_frobenius": Quantity(mean, "1", "Frobenius norm of the row Jacobian, mean over rows"),
    "attention/jacobian_spectral": Quantity(mean, "1", "Spectral norm of the row Jacobian, mean over rows"),
    "attention/off_diagonal_share": Quantity(
        mean, "1", "Share of the row Jacobian's energy off the diagonal, mean over rows; 0 for sigmoid"
    ),
    "attention/derivative_max": Quantity(largest, "1", "Largest own derivative of a weight; at most 1/4"),
    "attention/row_sum": Quantity(mean, "1", "Sum of a row's sigmoid weights, mean over rows"),
    "attention/saturated_share": Quantity(mean, "1", "Share of sigmoid weights above 0.99, mean over rows"),
}


def reduction_of(quantity: str) -> Reduction:
    """How measurements of a quantity join; what the training script logs (the loss) is averaged."""
    if quantity.startswith("_"):  # parts of a ratio, all of them norms
        return root_sum_of_squares
    return QUANTITIES[quantity].reduction if quantity in QUANTITIES else mean
