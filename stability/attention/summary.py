"""Row statistics reduced to what a probe records: one value a layer and one a head, labelled honestly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stability.attention.rows import Coverage

Kind = Literal["exact", "estimate", "lower_bound", "upper_bound"]


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
    """

    value: Tensor
    per_head: Tensor
    kind: Kind
    standard_error: Tensor | None = None
    per_head_standard_error: Tensor | None = None


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
    summary: dict[str, SummaryValue] = {}
    for name, rows in maxima.items():
        per_head = rows.masked_fill(~valid, float("-inf")).amax(dim=(0, 2))
        summary[name] = SummaryValue(
            per_head.amax(), per_head, "exact" if coverage == "all" else "lower_bound"
        )
    weights = row_weights[:, None] * valid
    for name, mean_rows in means.items():
        if mean_rows is None:
            continue
        kind: Kind = "exact" if coverage == "all" else "estimate"
        if name in upper_bounds:
            kind = "upper_bound"
        total = (weights * mean_rows).sum(dim=(0, 2))
        count = weights.sum(dim=(0, 2))
        value, per_head = total.sum() / count.sum(), total / count
        if coverage == "all":
            summary[name] = SummaryValue(value, per_head, kind)
        elif coverage == "given":  # any choice at all, from which nothing follows for the other rows
            unknown = torch.full_like(per_head, float("nan"))
            summary[name] = SummaryValue(value, per_head, kind, unknown[0], unknown)
        else:
            # Heads share their rows, so their errors add up before they are squared.
            residual = valid * (mean_rows - value)
            error = _standard_error(residual.sum(dim=1, keepdim=True), row_weights) / count.sum()
            residual = valid * (mean_rows - per_head[:, None])
            per_head_error = _standard_error(residual, row_weights) / count
            summary[name] = SummaryValue(value, per_head, kind, error.squeeze(0), per_head_error)
    return summary


def _standard_error(residual: Tensor, row_weights: Tensor) -> Tensor:
    """Standard error [heads] of Σ weight · residual over a sample with one row a stratum.

    The variance within a stratum is taken from the difference to the next row, as is usual for systematic
    samples (Wolter 1985): too large where the residual has a trend, but far less so than the variance over
    the whole sequence. A stratum of one row has no error.
    """
    if residual.shape[2] > 1:
        step = residual.diff(dim=2)
        variance = torch.cat([step, step[:, :, -1:]], dim=2) ** 2 / 2
    else:
        variance = torch.full_like(residual, float("nan"))
    size = row_weights[:, None]
    return torch.where(size > 1, size**2 * variance, 0.0).sum(dim=(0, 2)).sqrt()
