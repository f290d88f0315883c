"""Row statistics reduced to what a probe records: one value a layer and one a head, labelled honestly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from stability.attention.call import Mechanism
from stability.attention.logits import NEGATIVE_INFINITY
from stability.attention.rows import Coverage

if TYPE_CHECKING:
    from stability.attention.statistics import AttentionStatistics

Kind = Literal["exact", "estimate", "lower_bound", "upper_bound"]
"""How a recorded value relates to the quantity: exact, a sampled mean, or a bound of it."""

_MAXIMA = ("max_logit", "derivative_max")
_MEANS = ("entropy", "jacobian_frobenius", "jacobian_spectral", "off_diagonal_share")
_MEANS_OF_SIGMOID = (*_MEANS, "row_sum", "saturated_share")


@dataclass(frozen=True, eq=False)
class SummaryValue:
    """One quantity of one attention call, reduced over its valid rows.

    Attributes:
        value: 0-d, over all heads.
        per_head: [heads].
        kind: "exact"; "estimate" for a mean over some rows; "lower_bound" for a maximum over some rows;
            "upper_bound" for a mean of bounds (with a standard error if it is over a sample).
        standard_error: 0-d, of a sampled mean; None where all rows were measured and for maxima. It errs on
            the large side. NaN where the rows were given, or where a sample has a single row.
        per_head_standard_error: [heads], likewise.
        count: 0-d, how many rows a mean is over, those that sampled rows stand for included; None for maxima.
        per_head_count: [heads], likewise.
    """

    value: Tensor
    per_head: Tensor
    kind: Kind
    standard_error: Tensor | None = None
    per_head_standard_error: Tensor | None = None
    count: Tensor | None = None
    per_head_count: Tensor | None = None


class Quantity(NamedTuple):
    """What is recorded under a name, and how it relates to the truth."""

    name: str
    kind: Kind


class CallSummary(NamedTuple):
    """All quantities of one attention call, reduced over its valid rows.

    The tensors are flat: of each quantity its value over all heads, then one a head.

    Attributes:
        of_maxima: What `maxima` are of.
        of_means: What `means`, `standard_errors` and `counts` are of.
        maxima: [maxima · (1 + heads)].
        means: [means · (1 + heads)].
        standard_errors: Likewise; None where all rows were measured.
        counts: Likewise, how many rows each mean is over.
    """

    of_maxima: tuple[Quantity, ...]
    of_means: tuple[Quantity, ...]
    maxima: Tensor
    means: Tensor
    standard_errors: Tensor | None
    counts: Tensor

    def by_name(self) -> dict[str, SummaryValue]:
        """Quantity → value, maxima first."""
        summary = {}
        for (name, kind), maxima in zip(self.of_maxima, _each(self.maxima, self.of_maxima), strict=True):
            summary[name] = SummaryValue(maxima[0], maxima[1:], kind)
        errors = self.standard_errors
        for (name, kind), means, error, count in zip(
            self.of_means,
            _each(self.means, self.of_means),
            [None] * len(self.of_means) if errors is None else _each(errors, self.of_means),
            _each(self.counts, self.of_means),
            strict=True,
        ):
            of_all, of_heads = (None, None) if error is None else (error[0], error[1:])
            summary[name] = SummaryValue(means[0], means[1:], kind, of_all, of_heads, count[0], count[1:])
        return summary


def _each(flat: Tensor, quantities: Sequence[Quantity]) -> Sequence[Tensor]:
    return flat.view(len(quantities), -1).unbind()


@torch.no_grad()
def summarize_calls(calls: Sequence[AttentionStatistics]) -> list[CallSummary]:
    """Maxima and weighted means over the valid rows of each call; −inf or NaN where no row is valid.

    Calls of the same shape are summarised by the same operations: the tensors are small, and what costs is
    the number of operations on them.

    Args:
        calls: Statistics of attention calls.

    Returns:
        A summary for each call.
    """
    alike: dict[object, list[int]] = {}
    for index, call in enumerate(calls):
        rows = call.max_logit
        key = call.mechanism, call.coverage, call.spectral_kind, rows.shape, rows.dtype, rows.device
        alike.setdefault(key, []).append(index)
    summaries: dict[int, CallSummary] = {}
    for indices in alike.values():
        summaries.update(zip(indices, _summarize_alike([calls[index] for index in indices]), strict=True))
    return [summaries[index] for index in range(len(calls))]


def _summarize_alike(calls: Sequence[AttentionStatistics]) -> list[CallSummary]:
    first = calls[0]
    of_maxima, of_means = _quantities(first.mechanism, first.coverage, first.spectral_kind)
    shape = first.max_logit.shape
    rows = torch.stack([getattr(call, name) for call in calls for name, _ in of_maxima + of_means])
    rows = rows.view(len(calls), -1, *shape)  # [calls, quantities, batch, heads, rows]
    row_weights = torch.stack([call.row_weights for call in calls]).view(len(calls), 1, shape[0], 1, -1)
    largest, measured = rows.split([len(of_maxima), len(of_means)], dim=1)
    valid = largest[:, :1] != NEGATIVE_INFINITY

    maxima = largest.where(valid, NEGATIVE_INFINITY).amax(dim=(2, 4))
    maxima = torch.cat([maxima.amax(dim=2, keepdim=True), maxima], dim=2)

    # Rows that are not valid are zeros, and where all rows are measured the others have weight 1.
    counts = _of_all_and_each((row_weights * valid).sum(dim=(2, 4)))
    weighted = measured if first.coverage == "all" else measured * row_weights
    means = _of_all_and_each(weighted.sum(dim=(2, 4))) / counts
    errors: Sequence[Tensor | None] = [None] * len(calls)
    if first.coverage == "given":  # any choice at all, from which nothing follows for the other rows
        errors = torch.full_like(means, float("nan")).flatten(1).unbind()
    elif first.coverage == "sampled":
        errors = (_standard_errors(measured, valid, means, row_weights) / counts).flatten(1).unbind()

    return [
        CallSummary(of_maxima, of_means, *flat)
        for flat in zip(
            maxima.flatten(1).unbind(),
            means.flatten(1).unbind(),
            errors,
            counts.expand_as(means).flatten(1).unbind(),
            strict=True,
        )
    ]


@lru_cache
def _quantities(
    mechanism: Mechanism, coverage: Coverage, spectral_kind: Kind
) -> tuple[tuple[Quantity, ...], tuple[Quantity, ...]]:
    """The maxima and the means that are recorded."""
    of_maxima: Kind = "exact" if coverage == "all" else "lower_bound"
    of_means: Kind = "exact" if coverage == "all" else "estimate"
    kinds = dict.fromkeys(_MEANS_OF_SIGMOID if mechanism == "sigmoid" else _MEANS, of_means)
    if spectral_kind == "upper_bound":
        kinds["jacobian_spectral"] = spectral_kind
    return tuple(Quantity(name, of_maxima) for name in _MAXIMA), tuple(map(Quantity, kinds, kinds.values()))


def _of_all_and_each(per_head: Tensor) -> Tensor:
    """[..., 1 + heads] of sums [..., heads]: that of all heads first."""
    return torch.cat([per_head.sum(dim=-1, keepdim=True), per_head], dim=-1)


def _standard_errors(rows: Tensor, valid: Tensor, means: Tensor, row_weights: Tensor) -> Tensor:
    """Standard errors of Σ weight · row over a sample with one row a stratum: [calls, quantities, 1 + heads].

    The variance within a stratum is half the squared difference to the next row, as is usual for systematic
    samples (Wolter 1985): too large where the residual has a trend, but far less so than the variance over
    the whole sequence. A stratum of one row has no error, and the last one takes the difference before it.

    Args:
        rows: [calls, quantities, batch, heads, rows].
        valid: [calls, 1, batch, heads, rows].
        means: [calls, quantities, 1 + heads].
        row_weights: [calls, 1, batch, 1, rows], sizes of the strata.
    """
    if rows.shape[4] == 1:
        return torch.full_like(means, float("nan"))
    of_all, of_heads = means[:, :, None, :, None].split([1, rows.shape[3]], dim=3)
    # Heads share their rows, so their errors add up before they are squared.
    residual_of_all = ((rows - of_all) * valid).sum(dim=3, keepdim=True)
    residual = torch.cat([residual_of_all, (rows - of_heads) * valid], dim=3)
    factor = row_weights * row_weights * (row_weights > 1)
    last = factor[..., -2:].sum(dim=4, keepdim=True)
    factor = torch.cat([factor[..., :-2], last], dim=4)
    step = residual.diff(dim=4)
    return (step * step * factor).sum(dim=(2, 4)).mul_(0.5).sqrt_()
