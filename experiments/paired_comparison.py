"""Two mechanisms held against each other, seed by seed on each data set, and what that says of a claim.

One test, fixed beforehand: the paired t-test over seeds, two-sided, with Holm's correction over the data sets
of a family; intervals are at Bonferroni's level, so that all of a family hold at once. What holds over data
sets has them as its sample, however many seeds each has: another data set may behave otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
# Below this mean of softmax no share is taken of it: zero is no natural end of a silhouette's scale.
LEAST_MEAN = 0.05


@dataclass(frozen=True)
class Comparison:
    """Sigmoid less softmax on one data set.

    Attributes:
        dataset: Its name.
        softmax: Mean over seeds.
        sigmoid: Mean over seeds.
        difference: Mean over seeds of sigmoid less softmax.
        low: Lower end of the difference's interval, simultaneous over the family.
        high: Upper end.
        p: Holm's p-value.
        pairs: Seeds that both have.
    """

    dataset: str
    softmax: float
    sigmoid: float
    difference: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def verdict(self) -> Literal["higher", "lower", "undecided"]:
        """Sigmoid against softmax, where Holm's p-value is below 5 %."""
        if not self.p < LEVEL:  # NaN is undecided
            return "undecided"
        return "higher" if self.difference > 0 else "lower"


@dataclass(frozen=True)
class Overall:
    """Mean difference over data sets, as it is and over softmax's mean.

    A ratio of means, not a mean of ratios: a silhouette near 0 on one data set would outweigh all others.

    Attributes:
        softmax: Mean of softmax.
        difference: Sigmoid less softmax.
        difference_low: Lower end of its 95 % interval.
        difference_high: Upper end.
        relative: The difference as a share of softmax's mean, 0.25 is 25 %; NaN where that is below 0.05.
        low: Lower end of its 95 % interval.
        high: Upper end.
        datasets: Of how many.
    """

    softmax: float
    difference: float
    difference_low: float
    difference_high: float
    relative: float
    low: float
    high: float
    datasets: int


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: comparable with 5 % each, whatever their number.

    Args:
        p_values: Of one family; NaN stays NaN and counts as the largest.

    Returns:
        In the order given.

    Source:
        Holm, Scandinavian Journal of Statistics 6:65 (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    finite = [i for i in np.argsort(p_values, kind="stable") if np.isfinite(p_values[i])]
    for rank, i in enumerate(finite):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(
    values: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], *, family: int | None = None
) -> list[Comparison]:
    """Paired differences of one metric on each data set of a family.

    Args:
        values: Data set → softmax's and sigmoid's values of the same seeds, in the same order.
        family: How many comparisons intervals and p-values are corrected for, those yet to come among them,
            which count as the largest p-values; None: as many as are given.

    Returns:
        One comparison a data set. With fewer than two pairs intervals and p-value are NaN, and with equal
        differences the interval is a point.

    Example:
        >>> softmax, sigmoid = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.6, 3.4])
        >>> (found,) = compare({"blood": (softmax, sigmoid)})
        >>> round(found.difference, 3), round(found.low, 3), found.verdict
        (0.5, 0.252, 'higher')
    """
    family = len(values) if family is None else family
    raw = {name: _paired_t(sigmoid - softmax, LEVEL / family) for name, (softmax, sigmoid) in values.items()}
    yet_to_come = [float("nan")] * (family - len(values))
    adjusted = holm([p for _, _, p in raw.values()] + yet_to_come)[: len(values)]
    found = []
    for (name, (softmax, sigmoid)), p in zip(values.items(), adjusted, strict=True):
        low, high, _ = raw[name]
        means = float(softmax.mean()), float(sigmoid.mean())
        found.append(Comparison(name, *means, means[1] - means[0], low, high, p, len(softmax)))
    return found


def overall(comparisons: Sequence[Comparison]) -> Overall:
    """The mean difference d over data sets k, and the relative one r = Σ d / Σ s, s being softmax's means.

    The ratio's variance is that of the residuals d_k − r s_k over the squared mean of s (ratio estimator).

    Args:
        comparisons: Of one metric.

    Returns:
        Both with 95 % intervals of K − 1 degrees of freedom; no ratio where the mean of s is below
        `LEAST_MEAN`, and no intervals for a single data set.

    Source:
        Cochran, Sampling Techniques, 3rd edition (1977), chapter 6.

    Example:
        >>> means = {"a": 1.0, "b": 3.0}
        >>> found = overall([Comparison(k, s, 1.2 * s, 0.2 * s, 0, 0, 1, 10) for k, s in means.items()])
        >>> round(found.relative, 3), round(found.low, 3)
        (0.2, 0.2)
    """
    softmax = np.array([comparison.softmax for comparison in comparisons])
    differences = np.array([comparison.difference for comparison in comparisons])
    mean, difference = float(softmax.mean()), float(differences.mean())
    absolute = mean, difference, *_paired_t(differences, LEVEL)[:2]
    if not mean >= LEAST_MEAN:
        nan = float("nan")
        return Overall(*absolute, nan, nan, nan, len(comparisons))
    ratio = difference / mean
    low, high, _ = _paired_t((differences - ratio * softmax) / mean, LEVEL)
    return Overall(*absolute, ratio, ratio + low, ratio + high, len(comparisons))


def _paired_t(differences: NDArray[np.float64], level: float) -> tuple[float, float, float]:
    """Ends of the mean's interval at 1 − level, and the two-sided p-value of a mean of 0."""
    count, mean = len(differences), float(differences.mean())
    if count < 2:
        return float("nan"), float("nan"), float("nan")
    error = float(differences.std(ddof=1)) / count**0.5
    if error == 0:
        return mean, mean, 0.0 if mean else 1.0
    half = float(stats.t.ppf(1 - level / 2, count - 1)) * error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, count - 1))


def claim_sentence(
    subject: str,
    comparisons: Sequence[Comparison],
    *,
    direction: Literal["higher", "lower"],
    size: float = 0.0,
) -> str:
    """What the numbers say of a claim, in a sentence made of them alone.

    A claim with a size is held against the relative difference, one without against the difference itself.

    Args:
        subject: Of the sentence, such as "Silhouette".
        comparisons: Of the family.
        direction: What is claimed of sigmoid.
        size: By how much at least; 0.25 is 25 %.

    Returns:
        The sentence.
    """
    total = overall(comparisons)
    is_single = total.datasets == 1
    over = "a single data set, which decides nothing"
    if not is_single:
        ends = f"{total.difference_low:+.4f} to {total.difference_high:+.4f}"
        over = f"95 % interval over {total.datasets} data sets {ends}"
    found = f"sigmoid {total.difference:+.4f} against softmax's mean of {total.softmax:.4f} ({over})"
    low, high = total.difference_low, total.difference_high
    claim, least = str(direction), 0.0
    sized = f"{size:.0%} {direction}" if size else claim
    if broken := [each.dataset for each in comparisons if not np.isfinite(each.difference)]:
        claim, found = sized, f"no mean is told, as a value of {', '.join(broken)} is no finite number"
    elif np.isnan(total.relative):
        found += f", of which no share is taken, that mean being below {LEAST_MEAN:g}"
        found += f" ({sized} is not judged then)" if size else ""
    else:
        found += f", {total.relative:+.1%}"
        if size:
            claim, least, low, high = sized, size, total.low, total.high
            found += "" if is_single else f" ({low:+.1%} to {high:+.1%})"
    bottom, top = (low, high) if direction == "higher" else (-high, -low)
    answer = "neither reached nor excluded"
    if bottom > 0 and bottom >= least:
        answer = "reached"
    elif top < least:  # no difference at all is on neither side
        answer = "excluded"
    higher, lower, undecided = (_names(comparisons, verdict) for verdict in ("higher", "lower", "undecided"))
    return (
        f"{subject}: {found}, so that the claim of {claim} is {answer}; "
        f"higher in {higher}, lower in {lower}, undecided in {undecided} (Holm, 5 %)."
    )


def _names(comparisons: Sequence[Comparison], verdict: str) -> str:
    names = [comparison.dataset for comparison in comparisons if comparison.verdict == verdict]
    return f"{len(names)} ({', '.join(names)})" if names else "none"
