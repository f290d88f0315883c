"""What all ranks measured, as one: the numbers that one process with the whole batch would have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.quantities import largest, mean, reduction_of, root_mean_square, root_sum_of_squares
from probes.record import Series


class RankReduction:
    """Joins the values v of each slot over the ranks that have one, by the rule of its quantity.

    With the ranks' weights w (:class:`probes.pending.Measurement`): norms sqrt(Σ w v²), sums Σ w v, means
    Σ w v / Σ w, root mean squares sqrt(Σ w v² / Σ w), maxima max v, standard errors of means
    sqrt(Σ w² e²) / Σ w. A weight of 0 says that a rank has no value, NaN that it should have one and has
    not: then nobody has. A weight below 0 counts as much as above, of a value that is not exact.

    Args:
        series: Of each slot.
        are_errors: Which slots are standard errors.
        device: Where the values are.
    """

    def __init__(self, series: Sequence[Series], are_errors: Sequence[bool], device: torch.device) -> None:
        reductions = [reduction_of(name.quantity) for name in series]

        def mask(chosen: list[bool]) -> Tensor:
            return torch.tensor(chosen, device=device)

        self._is_error = mask(list(are_errors))
        self._is_largest = mask([reduction is largest for reduction in reductions]) & ~self._is_error
        roots = (root_sum_of_squares, root_mean_square)
        self._is_root = mask([reduction in roots for reduction in reductions]) | self._is_error
        means = (mean, root_mean_square)
        self._is_mean = mask([reduction in means for reduction in reductions]) & ~self._is_error
        # Most steps have neither: their operations are left out.
        self._has_errors = any(are_errors)
        self._has_maxima = any(reduction is largest for reduction in reductions)
        self._is_weighted = self._is_mean | self._is_error  # by their weights between ranks, not within one

    def __call__(self, values: Tensor, weights: Tensor, first_slot: int = 0) -> Tensor:
        """Joins.

        Args:
            values: [ranks, n] of n slots, in float64.
            weights: [ranks, n].
            first_slot: The first of them.

        Returns:
            [3, n]: the joined values; the sum of their weights, 0 where there is none and below 0 where one
            is not exact; the lowest rank whose value is NaN or +∞, or −1 where none or all of them are. (−∞
            is the largest of no logits.)
        """
        these = slice(first_slot, first_slot + values.shape[1])
        sizes = weights.abs()
        is_there = sizes > 0
        values = values.where(is_there, 0.0)
        joined = self._join(values, sizes, is_there, these)

        num_there = is_there.sum(dim=0)
        is_broken = ~(values < torch.inf)
        num_broken = is_broken.sum(dim=0)
        first_broken = is_broken.to(values.dtype).argmax(dim=0)
        is_telling = (num_broken > 0) & (num_broken < num_there)
        return torch.stack(
            [
                joined,
                _signed(sizes.sum(dim=0), weights).nan_to_num(nan=0.0),
                first_broken.where(is_telling, -1).to(joined.dtype),
            ]
        )

    def join_parts(self, values: Tensor, weights: Tensor) -> Tensor:
        """Joins one rank's own measurements of each slot, as a single process does: its means count alike.

        Args:
            values: [parts, slots], in float64.
            weights: [parts, slots], 0 where there are fewer parts.

        Returns:
            [2, slots]: a value and a weight for joining the ranks.
        """
        sizes = weights.abs()
        is_there = sizes > 0
        counts = is_there.to(sizes.dtype)
        joined = self._join(values, counts.where(self._is_weighted, sizes), is_there, slice(None))
        weight = sizes.sum(dim=0).where(self._is_weighted, counts.amax(dim=0))
        return torch.stack([joined.where(weight > 0, 0.0), _signed(weight, weights)])

    def _join(self, values: Tensor, weights: Tensor, is_there: Tensor, these: slice) -> Tensor:
        is_error, is_root = self._is_error[these], self._is_root[these]
        powers = values.square().where(is_root, values)
        factors = weights.square().where(is_error, weights) if self._has_errors else weights
        count = weights.sum(dim=0)
        joined = (factors * powers).sum(dim=0) / count.where(self._is_mean[these], 1.0)
        joined = joined.sqrt().where(is_root, joined)
        if self._has_errors:
            joined = joined / count.where(is_error, 1.0)
        if not self._has_maxima:
            return joined
        maxima = values.where(is_there, -torch.inf).amax(dim=0)
        return maxima.where(self._is_largest[these], joined)


def _signed(size: Tensor, weights: Tensor) -> Tensor:
    """The size, below 0 where one of the weights is."""
    return size.where((weights >= 0).all(dim=0), -size)
