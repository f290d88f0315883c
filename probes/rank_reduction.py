"""What all ranks measured, as one: the numbers that one process with the whole batch would have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.quantities import largest, mean, reduction_of, root_mean_square, root_sum_of_squares
from probes.record import Series


class Counting(NamedTuple):
    """How one rank's own measurements count, as long as it measures as many.

    Attributes:
        is_there: [parts, slots], where it has a value.
        multipliers: [parts, slots], of the values, or of their squares where those are added.
        weights: [slots], of what they join to, for joining the ranks.
    """

    is_there: Tensor
    multipliers: Tensor
    weights: Tensor


class Joined(NamedTuple):
    """The numbers of all ranks, a slot an entry.

    Attributes:
        values: float64.
        is_there: Whether there is a value.
        is_exact: Whether that of every rank is; of a standard error, whether its mean is.
        first_broken: Of slots whose value is NaN or +∞ on some ranks only, the lowest of these. (−∞ is the
            largest of no logits.)
    """

    values: np.ndarray
    is_there: np.ndarray
    is_exact: np.ndarray
    first_broken: dict[int, int]


class RankReduction:
    """Joins the values v of each slot over the ranks that have one, by the rule of its quantity.

    With the ranks' weights w (:class:`probes.pending.Measurement`): norms sqrt(Σ w v²), sums Σ w v, means
    Σ w v / Σ w, root mean squares sqrt(Σ w v² / Σ w), maxima max v, standard errors of means
    sqrt(Σ w² e²) / Σ w, with the weights of the means. A weight of 0 says that a rank has no value, NaN that
    it should have one and has not: then nobody has. A weight below 0 counts as much as above, of a value that
    is not exact.

    All of these are sums or maxima of what a rank computes alone (:meth:`own`), so that few kernels are
    launched for all ranks (:meth:`over_ranks`); roots and quotients are formed on the host (:meth:`finish`).

    Args:
        series: Of each slot.
        are_errors: Which slots are standard errors; each comes after the slot of its mean.
        device: Where the values are.
    """

    def __init__(self, series: Sequence[Series], are_errors: Sequence[bool], device: torch.device) -> None:
        reductions = [reduction_of(name.quantity) for name in series]
        value_slots = {
            name: index
            for index, (name, is_error) in enumerate(zip(series, are_errors, strict=True))
            if not is_error
        }
        self._of_values = np.array(
            [value_slots.get(name, index) for index, name in enumerate(series)], dtype=np.int64
        )
        self._are_errors = np.array(are_errors, dtype=bool)
        are_means = [reduction in (mean, root_mean_square) for reduction in reductions]
        self._are_means = np.array(are_means, dtype=bool) & ~self._are_errors
        are_roots = [reduction in (root_sum_of_squares, root_mean_square) for reduction in reductions]
        self._are_roots = np.array(are_roots, dtype=bool) | self._are_errors
        are_largest = (
            np.array([reduction is largest for reduction in reductions], dtype=bool) & ~self._are_errors
        )
        # Most steps have neither: their operations are left out.
        self._has_errors, self._has_maxima = any(are_errors), bool(are_largest.any())

        self._values_on_device = torch.from_numpy(self._of_values).to(device)
        self._is_error = torch.from_numpy(self._are_errors).to(device)
        self._is_mean = torch.from_numpy(self._are_means).to(device)
        self._is_root = torch.from_numpy(self._are_roots).to(device)
        self._is_largest = torch.from_numpy(are_largest).to(device)
        self._absent = torch.from_numpy(np.where(are_largest, -np.inf, 0.0)).to(device)
        self._ranks = torch.empty(0, 1, dtype=torch.float64, device=device)

    def count(self, weights: Tensor, factors: Tensor) -> Counting:
        """How one rank's measurements of each slot count: means alike, as in a single process.

        Args:
            weights: [parts, slots], in float64, 0 where there are fewer parts.
            factors: [parts, slots], what the values are to be multiplied by.
        """
        sizes = weights.abs()
        is_there = sizes > 0
        total, num_parts = sizes.sum(dim=0), is_there.sum(dim=0)
        has_any = (num_parts > 0).to(sizes.dtype)
        # Of a mean of k values some may be exact, without an error: it has the standard error sqrt(Σ e²)/k.
        share = (total / num_parts)[self._values_on_device]
        share = share.square().where(self._is_error, share)
        multipliers = share.where(self._is_mean | self._is_error, sizes.where(~self._is_largest, 1.0))
        multipliers = multipliers * factors.square().where(self._is_root, factors)
        size = total.where(self._is_mean, has_any)
        return Counting(is_there, multipliers, size.where((weights >= 0).all(dim=0), -size))

    def own(self, values: Tensor, counting: Counting) -> Tensor:
        """What one rank adds to the sums, or sets against the maxima, of all.

        Args:
            values: [parts, slots], in float64.
            counting: How they count.

        Returns:
            [slots].
        """
        powers = values.square().where(self._is_root, values) * counting.multipliers
        powers = powers.where(counting.is_there, self._absent)
        if len(powers) == 1:
            return powers[0]
        added = powers.sum(dim=0)
        return powers.amax(dim=0).where(self._is_largest, added) if self._has_maxima else added

    def over_ranks(self, gathered: Tensor, first_slot: int = 0) -> Tensor:
        """Adds up what the ranks have sent.

        Args:
            gathered: [ranks, 2, n], of n slots :meth:`own` and the weights.
            first_slot: The first of them.

        Returns:
            [5, n], for :meth:`finish`.
        """
        values, weights = gathered.unbind(dim=1)
        if len(self._ranks) != len(values):
            self._ranks = torch.arange(-len(values), 0, dtype=torch.float64, device=values.device)[:, None]
        joined = values.sum(dim=0)
        if self._has_maxima:
            is_largest = self._is_largest[first_slot : first_slot + values.shape[1]]
            joined = values.amax(dim=0).where(is_largest, joined)
        sizes = weights.abs()
        # Of a rank that is broken its number, counted from the end; the first of them is the lowest.
        lowest, highest = torch.aminmax(sizes.where(values < torch.inf, self._ranks), dim=0)
        return torch.stack([joined, sizes.sum(dim=0), weights.amin(dim=0), lowest, highest])

    def finish(self, sums: np.ndarray) -> Joined:
        """The joined numbers of all slots.

        Args:
            sums: [5, slots], what :meth:`over_ranks` returned.
        """
        joined, weights, lowest_weight, lowest, highest = sums
        values = joined.copy()
        with np.errstate(all="ignore"):
            np.divide(values, weights, out=values, where=self._are_means)
            np.sqrt(values, out=values, where=self._are_roots)
            is_there, is_exact = weights > 0, lowest_weight >= 0
            if self._has_errors:
                np.divide(values, weights[self._of_values], out=values, where=self._are_errors)
                is_exact = is_exact[self._of_values]
            first_broken = {
                int(slot): len(self._ranks) + int(lowest[slot])
                for slot in (lowest < 0).nonzero()[0]
                if highest[slot] > 0
            }
        return Joined(values, is_there, is_exact, first_broken)
