"""Which steps record what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """At each how many steps something is measured; 0: never. See :func:`probes.attach`.

    Attributes:
        gradients: Norms of gradients and weights.
        activations: Outputs of blocks and the gradients there.
        details: Outputs of every layer, largest entries, counts, updates.
        attention: Attention statistics.
        layer_jacobians: Jacobians of whole layers.
    """

    gradients: int
    activations: int
    details: int
    attention: int
    layer_jacobians: int


def is_due(step: int, every: int) -> bool:
    """Whether what is measured at every so many steps is measured at this one; 0: never."""
    return every > 0 and step % every == 0
