"""Row statistics reduced to what a probe records: one value a layer and one a head, labelled honestly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stability.attention.rows import Coverage

Kind = Literal["exact", "estimate", "lower_bound", "upper_bound"]
"""How a recorded value relates to the quantity: exact, a sampled mean, or a bound of it."""


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


def summarize_rows(
    *,
    maxima: dict[str, Tensor],
    means: dict[str, Tensor | None],
    upper_bounds: set[str],
    row_weights: Tensor,
    valid: Tensor,
    coverage: Coverage,
) -> dict[str, SummaryValue]:
    """Maxima and weighted means over valid rows; NaN or −inf where no row is valid.

    Args:
        maxima: Quantities [batch, heads, num_rows] to take the maximum of.
        means: Quantities to take the mean of; None entries are skipped.
        upper_bounds: Names of means whose rows are upper bounds.
        row_weights: [batch, num_rows], how many rows each stands for.
        valid: [batch, heads, num_rows].
        coverage: Whether the rows are all, a stratified sample, or given.

    Returns:
        Name → value, maxima first.
    """
    # All quantities at once: the tensors are small, and what costs is the number of calls on them.
    summary: dict[str, SummaryValue] = {}
    stacked = torch.stack(list(maxima.values())).masked_fill_(~valid, float("-inf"))
    per_head = stacked.amax(dim=(1, 3))
    value = per_head.amax(dim=1)
    for i, name in enumerate(maxima):
        summary[name] = SummaryValue(value[i], per_head[i], "exact" if coverage == "all" else "lower_bound")

    measured = {name: rows for name, rows in means.items() if rows is not None}
    stacked = torch.stack(list(measured.values()))
    weights = row_weights[:, None] * valid
    total = (weights * stacked).sum(dim=(1, 3))
    count = weights.sum(dim=(0, 2))
    count_of_all = count.sum()
    value, per_head = total.sum(dim=1) / count_of_all, total / count
    error = per_head_error = None
    if coverage == "given":  # any choice at all, from which nothing follows for the other rows
        error = torch.full_like(value, float("nan"))
        per_head_error = torch.full_like(per_head, float("nan"))
    elif coverage == "sampled":
        # Heads share their rows, so their errors add up before they are squared.
        of_all = ((stacked - value[:, None, None, None]) * valid).sum(dim=2, keepdim=True)
        of_heads = (stacked - per_head[:, None, :, None]) * valid
        errors = _standard_errors(torch.cat([of_all, of_heads], dim=2), row_weights)
        error, per_head_error = errors[:, 0] / count_of_all, errors[:, 1:] / count
    for i, name in enumerate(measured):
        kind: Kind = "exact" if coverage == "all" else "estimate"
        summary[name] = SummaryValue(
            value[i],
            per_head[i],
            "upper_bound" if name in upper_bounds else kind,
            None if error is None else error[i],
            None if per_head_error is None else per_head_error[i],
            count_of_all,
            count,
        )
    return summary


def _standard_errors(residual: Tensor, row_weights: Tensor) -> Tensor:
    """Standard errors [quantities, heads] of Σ weight · residual over a sample with one row a stratum.

    The variance within a stratum is half the squared difference to the next row, as is usual for systematic
    samples (Wolter 1985): too large where the residual has a trend, but far less so than the variance over
    the whole sequence. A stratum of one row has no error, and the last one takes the difference before it.

    Args:
        residual: [quantities, batch, heads, num_rows].
        row_weights: [batch, num_rows], sizes of the strata.
    """
    if residual.shape[3] == 1:
        return residual.new_full((residual.shape[0], residual.shape[2]), float("nan"))
    size = row_weights[:, None]
    factor = size * size * (size > 1)
    last = factor[:, :, -2:].sum(dim=2, keepdim=True)
    factor = torch.cat([factor[:, :, :-2], last], dim=2)
    step = residual[..., 1:] - residual[..., :-1]
    return (step * step * factor).sum(dim=(1, 3)).mul_(0.5).sqrt_()
