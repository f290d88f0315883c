"""From verdicts to scores: the rules of the fault suite in one place.

* **Detected**: the first verdict on a step at or after the fault's onset, whatever it is about. Verdicts on
  earlier steps are false alarms.
* **Delay**: steps from the onset until the verdict is heard. 0 is a verdict at the very step; a tool that
  judges a step's numbers when the next step ends (ours) hears one step later.
* **Layer right**: the first verdict names the faulty module, one inside it, or one that contains it and is
  no larger than a block. For a fault that is no layer's (learning rate, batch, labels): "(all)", which is
  where the loss is, or a layer that reads the batch.
* **Clean band**: at each step the interval that holds 99.9 % of the fault-free losses: the prediction
  interval of a normal distribution of their cube root, from every fault-free run of the same set-up and five
  steps either side. (Losses scatter like gamma variables, whose cube roots are nearly normal: Wilson and
  Hilferty, 1931.)
* **Departure**: the first step from the onset on whose loss is no finite number, or outside the clean band
  while that of the paired run (same seed, same data, no fault) is inside. A loss that never leaves departs
  when the run ends.
* **Lead**: steps from the moment the verdict is heard to the departure; negative where the loss was faster.
* **False alarms**: episodes of verdicts in clean runs. A verdict more than ten steps after the last one
  begins a new episode, whatever it is about.

Proportions have Wilson intervals, rates exact Poisson intervals, medians bootstrap intervals; all 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from experiments.detection_models import SETUPS
from experiments.detection_suite import Run
from stability.divergence import ALL_LAYERS

BAND = 0.999
BAND_HALF_WIDTH = 5
EPISODE_GAP = 10

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """What a tool said.

    Attributes:
        step: The step whose numbers it judged.
        heard: The step by whose end its user heard.
        layer: The layer it named first, "(all)" for the whole model, "" for none.
        text: Its words.
    """

    step: int
    heard: int
    layer: str
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a tool did on one run with a fault.

    Attributes:
        run: The run.
        verdicts: All it said.
        departure: Step at which the loss left its clean band, or the run's length.
    """

    run: Run
    verdicts: tuple[Verdict, ...]
    departure: int

    @property
    def onset(self) -> int:
        """First step of the fault."""
        assert self.run.fault is not None
        return self.run.fault.step

    @cached_property
    def detection(self) -> Verdict | None:
        """The verdict that counts."""
        return next((verdict for verdict in self.verdicts if verdict.step >= self.onset), None)

    @property
    def num_early(self) -> int:
        """Episodes of verdicts before the fault."""
        return num_episodes([verdict.step for verdict in self.verdicts if verdict.step < self.onset])

    @property
    def is_layer_right(self) -> bool:
        """Whether the verdict that counts names the layer."""
        assert self.run.fault is not None
        first_layers = SETUPS[self.run.setup].first_layers
        return self.detection is not None and names_layer(
            self.detection.layer, self.run.fault.layer, first_layers
        )

    @property
    def delay(self) -> int | None:
        """Steps from onset to hearing; None if there was nothing to hear."""
        return None if self.detection is None else self.detection.heard - self.onset

    @property
    def lead(self) -> int | None:
        """Steps from hearing to the loss's departure; None if there was nothing to hear."""
        return None if self.detection is None else self.departure - self.detection.heard


def names_layer(named: str, faulty: str | None, first_layers: Sequence[str]) -> bool:
    """Whether the layer a tool named is the faulty one.

    Args:
        named: As the tool wrote it; of a module's later call, the part behind "/" does not count.
        faulty: Module the fault sits in, or None.
        first_layers: Right as well where it sits in none.

    Example:
        >>> names_layer("blocks.1", "blocks.1.mlp", ())
        True
        >>> names_layer("blocks.1", "blocks.10", ()), names_layer("blocks", "blocks.1", ())
        (False, False)
    """
    named = named.partition("/")[0]
    if faulty is None:
        return named == ALL_LAYERS or named in first_layers
    is_within_block = any(part.isdigit() for part in named.split("."))  # the lists of blocks hold all of them
    contains = is_within_block and faulty.startswith(f"{named}.")
    return named == faulty or named.startswith(f"{faulty}.") or contains


def num_episodes(steps: Sequence[int]) -> int:
    """Episodes in the steps of verdicts.

    Example:
        >>> num_episodes([3, 3, 12, 40])
        2
    """
    ordered = sorted(steps)
    return bool(ordered) + sum(later - earlier > EPISODE_GAP for earlier, later in pairwise(ordered))


class CleanBand:
    """Where the loss of fault-free runs lies.

    Args:
        losses: [runs, steps], not negative; runs of one set-up that differ in their seed.

    Attributes:
        low: [steps].
        high: [steps].
    """

    def __init__(self, losses: FloatArray) -> None:
        roots = np.cbrt(losses)
        windows = [
            roots[:, max(0, step - BAND_HALF_WIDTH) : step + BAND_HALF_WIDTH + 1].ravel()
            for step in range(roots.shape[1])
        ]
        centre = np.array([window.mean() for window in windows])
        size = np.array([len(window) for window in windows])
        scatter = np.array([window.std(ddof=1) for window in windows])
        half_width = stats.t.ppf((1 + BAND) / 2, size - 1) * scatter * np.sqrt(1 + 1 / size)
        self.low: FloatArray = np.maximum(centre - half_width, 0) ** 3
        self.high: FloatArray = (centre + half_width) ** 3

    def departure(self, losses: FloatArray, paired: FloatArray, onset: int) -> int:
        """First step at which a run's loss has left the band; the run's length if it never does.

        Args:
            losses: Of the run with a fault, [steps].
            paired: Of the same run without it, [steps].
            onset: First step of the fault.
        """
        is_outside = ~self._holds(losses) & (self._holds(paired) | ~np.isfinite(losses))
        is_outside[:onset] = False
        return int(np.argmax(is_outside)) if is_outside.any() else len(losses)

    def _holds(self, losses: FloatArray) -> NDArray[np.bool_]:
        return (losses >= self.low) & (losses <= self.high)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def proportion(count: int, total: int) -> Interval:
    """Share with its Wilson interval; NaN of nothing.

    Example:
        >>> share = proportion(98, 100)
        >>> round(share.low, 3), round(share.high, 3)
        (0.93, 0.994)
    """
    if not total:
        return Interval(math.nan, math.nan, math.nan)
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Interval(count / total, float(interval.low), float(interval.high))


def rate(count: int, steps: int, per: int = 10_000) -> Interval:
    """Events per so many steps with the exact Poisson interval.

    Example:
        >>> print(f"{rate(0, 50_000).high:.2f}")
        0.74
    """
    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    high = stats.chi2.ppf(0.975, 2 * count + 2) / 2
    return Interval(*(number * per / steps for number in (count, float(low), float(high))))


def median(values: Sequence[float]) -> Interval:
    """Median with its bootstrap interval (seeded); NaN of nothing."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    data = np.array(values, dtype=np.float64)
    draws = np.random.default_rng(0).choice(data, size=(2000, len(data)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Interval(float(np.median(data)), float(low), float(high))


@dataclass(frozen=True)
class Score:
    """How a tool did on some runs with faults.

    Attributes:
        num_runs: How many.
        recall: Share that was detected.
        layer: Share of the detected whose layer is right.
        delay: Median of the detected, in steps.
        lead: Median of the detected, in steps.
    """

    num_runs: int
    recall: Interval
    layer: Interval
    delay: Interval
    lead: Interval


def score(outcomes: Sequence[Outcome]) -> Score:
    """Sums up."""
    detected = [outcome for outcome in outcomes if outcome.detection is not None]
    return Score(
        len(outcomes),
        proportion(len(detected), len(outcomes)),
        proportion(sum(outcome.is_layer_right for outcome in detected), len(detected)),
        median([outcome.delay for outcome in detected if outcome.delay is not None]),
        median([outcome.lead for outcome in detected if outcome.lead is not None]),
    )


def departures(losses: Mapping[Run, FloatArray]) -> dict[Run, int]:
    """The departure of every run with a fault.

    Args:
        losses: Of runs with faults, their pairs, and further fault-free runs like these.
    """
    clean: dict[Run, list[FloatArray]] = {}
    for run, values in losses.items():
        if run.fault is None:
            clean.setdefault(replace(run, seed=0), []).append(values)
    faulty = {run: run.fault.step for run in losses if run.fault is not None}
    bands = {run: CleanBand(np.stack(clean[run])) for run in {replace(run.pair, seed=0) for run in faulty}}
    return {
        run: bands[replace(run.pair, seed=0)].departure(losses[run], losses[run.pair], onset)
        for run, onset in faulty.items()
    }
