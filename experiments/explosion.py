"""What counts as an explosion, and every verdict of the stress test, in one place.

Long runs have a healthy past of their own to be compared with: `experiments/sustained_explosion.py`.

All numbers are global gradient norms (over all parameters, before the optimizer's step, never clipped).

* **First steps**: Adam without warm-up takes full-size steps from its first estimate on, so nearly every run
  jumps at once. That transient (`FIRST_STEPS` steps) is a column of its own and is never called explosion.
* **Explained variance**: 1 − loss / loss of predicting the mean, summed over the last tenth of the steps (at
  least ten). The mean is that of every hidden value the run saw; both losses are of the same batches.
* **Healthy median**: the median gradient norm after the first steps of the run with the same mechanism and
  seed that learned (explained variance ≥ `LEARNED`) at the lowest learning rate. No such run, no baseline.
* **Orders**: log10(peak after the first steps / healthy median).
* **First layer**: the layer whose gradient norm was the first to reach `EXPLOSION_FACTOR` times its own
  healthy median, or to be no number, first steps included; of several at one step the one furthest above.

Verdicts, the first that applies: *interrupted*; *exploded* (a loss or gradient is no finite number, or the
peak after the first steps is ≥ `EXPLOSION_FACTOR` × the healthy median); *too short* (no step after the first
ones); *diverged* (loss in the last tenth above `DIVERGED` × both the first loss and that of predicting the
mean); *no learning* (explained variance below `LEARNED`, however calm the gradient); *stable*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FIRST_STEPS = 10
EXPLOSION_FACTOR = 1e4
LEARNED = 0.1
DIVERGED = 2.0

Verdict = Literal["stable", "no learning", "diverged", "exploded", "too short", "interrupted"]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What one training run recorded; every array has one entry per step.

    Attributes:
        mechanism: "softmax" or "sigmoid".
        learning_rate: Of AdamW.
        seed: Of weights and batches.
        losses: Masked-value losses.
        mean_losses: Losses of predicting the mean on the same batches.
        grad_norms: Global gradient norms.
        layer_grad_norms: Gradient norms by layer name.
        seconds: Wall-clock time.
        is_interrupted: Whether the user stopped it.
    """

    mechanism: str
    learning_rate: float
    seed: int
    losses: FloatArray
    mean_losses: FloatArray
    grad_norms: FloatArray
    layer_grad_norms: dict[str, FloatArray] = field(repr=False)
    seconds: float
    is_interrupted: bool

    @property
    def name(self) -> str:
        """Also the name of its TensorBoard directory."""
        return f"{self.mechanism}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def explained_variance(self) -> float:
        """See the module's definitions; NaN without steps."""
        mean_loss = self.mean_losses[self._last_tenth].sum()
        return float(1 - self.losses[self._last_tenth].sum() / mean_loss) if mean_loss > 0 else float("nan")

    @property
    def has_diverged(self) -> bool:
        """See the module's definitions; needs a step."""
        least = max(self.losses[0], self.mean_losses[self._last_tenth].mean())
        return bool(self.losses[self._last_tenth].mean() > DIVERGED * least)

    @property
    def _last_tenth(self) -> slice:
        return slice(-max(FIRST_STEPS, len(self.losses) // 10), None)


@dataclass(frozen=True)
class Judgement:
    """A run's row of the summary table; None where there is nothing to say.

    Attributes:
        first_peak: Largest gradient norm of the first steps.
        peak: Largest gradient norm after them.
        median: Median gradient norm after them.
        last: Gradient norm of the last step.
        healthy_median: The baseline that `orders` refers to.
        orders: Orders of magnitude of the explosion; negative if the run stays below the baseline.
        first_layer: First layer to explode, of exploded runs.
        explained_variance: In the last tenth of the run.
        verdict: See the module's definitions.
    """

    first_peak: float | None
    peak: float | None
    median: float | None
    last: float | None
    healthy_median: float | None
    orders: float | None
    first_layer: str | None
    explained_variance: float
    verdict: Verdict


def judge(runs: list[Run]) -> list[Judgement]:
    """Judge the runs of one stress test against each other.

    Args:
        runs: In any order.

    Returns:
        One judgement per run, in the same order.

    Source:
        Own definitions, fixed in this module's docstring.

    Example:
        >>> ones = np.ones(30)
        >>> healthy = Run("softmax", 1e-3, 0, 0.5 * ones, ones, ones, {}, 1.0, False)
        >>> wild = Run("softmax", 1.0, 0, ones, ones, 3e4 * ones, {}, 1.0, False)
        >>> [(row.verdict, round(row.orders, 1)) for row in judge([healthy, wild])]
        [('stable', 0.0), ('exploded', 4.5)]
    """
    return [_judge_one(run, _healthy_run(run, runs)) for run in runs]


def _healthy_run(run: Run, runs: list[Run]) -> Run | None:
    candidates = [
        other
        for other in runs
        if (other.mechanism, other.seed) == (run.mechanism, run.seed)
        and not other.is_interrupted
        and len(other.grad_norms) > FIRST_STEPS
        and other.explained_variance >= LEARNED
    ]
    return min(candidates, key=lambda other: other.learning_rate, default=None)


def _judge_one(run: Run, healthy: Run | None) -> Judgement:
    later = run.grad_norms[FIRST_STEPS:]
    baseline = None if healthy is None else float(np.median(healthy.grad_norms[FIRST_STEPS:]))
    orders = None
    if baseline and len(later):
        orders = float(np.log10(np.max(later) / baseline))  # a NaN stays one
    is_finite = bool(np.isfinite(run.losses).all() and np.isfinite(run.grad_norms).all())
    verdict: Verdict
    if run.is_interrupted:
        verdict = "interrupted"
    elif not is_finite or (orders is not None and 10**orders >= EXPLOSION_FACTOR):
        verdict = "exploded"
    elif not len(later):
        verdict = "too short"
    elif run.has_diverged:
        verdict = "diverged"
    elif run.explained_variance < LEARNED:
        verdict = "no learning"
    else:
        verdict = "stable"
    return Judgement(
        first_peak=_or_none(run.grad_norms[:FIRST_STEPS], np.max),
        peak=_or_none(later, np.max),
        median=_or_none(later, np.median),
        last=float(run.grad_norms[-1]) if len(run.grad_norms) else None,
        healthy_median=baseline,
        orders=orders,
        first_layer=_first_layer(run, healthy) if verdict == "exploded" else None,
        explained_variance=run.explained_variance,
        verdict=verdict,
    )


def _first_layer(run: Run, healthy: Run | None) -> str | None:
    """The first layer to explode; without a baseline only gradients that are no numbers count."""
    crossings = []
    for layer, norms in run.layer_grad_norms.items():
        if healthy is None:
            ratio = np.where(np.isfinite(norms), 0.0, np.inf)
        else:
            baseline = np.median(healthy.layer_grad_norms[layer][FIRST_STEPS:])
            ratio = np.where(np.isfinite(norms), norms / max(baseline, np.finfo(float).tiny), np.inf)
        above = np.flatnonzero(ratio >= EXPLOSION_FACTOR)
        if len(above):
            crossings.append((above[0], -ratio[above[0]], layer))
    return min(crossings)[2] if crossings else None


def _or_none(norms: FloatArray, statistic: Callable[..., Any]) -> float | None:
    return float(statistic(norms)) if len(norms) else None
