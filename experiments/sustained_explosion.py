"""What counts as an explosion in a long run, which is its own baseline.

The short ladder of `experiments/explosion.py` compares runs with each other; a long run has a healthy past
of its own. All numbers are global gradient norms as the optimizer receives them; the loss is the training
loss.

* **Baseline**: median gradient norm of steps 100 to 300. It is **healthy** if every loss and gradient of the
  first 300 steps is finite, no norm of steps 100 to 300 exceeds `CALM` times that median, and the loss of
  steps 250 to 300 lies below that of the first ten. A run without a healthy baseline keeps its numbers and
  cannot explode by this definition.
* **First steps**: log10(largest norm of the first 100 steps / baseline), a column of its own.
* **Peak**: log10(largest norm after step 300 / baseline); a norm that is no finite number counts as infinite.
* **Sustained**: log10(the largest level that `SUSTAINED_STEPS` consecutive norms after step 300 all reach /
  baseline). **Exploded** means 4 or more, over a healthy baseline; lower orders are reported as they are.
* **Diverged at**: the first step with a loss or norm that is no finite number, or where an explosion begins.
* **First layer**: after step 300, the layer that was first to stay `SUSTAINED_STEPS` steps at 10ᵏ times its
  own median of steps 100 to 300, where k is the run's sustained order rounded down, at least 1 and at most
  4; of several at one step the one that is farthest above. A layer whose median is zero has no say.
* **Gain**: what the model knows beyond the task's reference at the last validation: for cross-entropy, nats
  below the unigram cross-entropy of the training cells; for regression, explained variance.
* **Learned**: at the last validation the loss lies `LEAST_GAIN` (nats, or shares of the variance) and more
  below what a hidden token can know without attention (a gene's frequency at its rank; its mean value).
  Below that, nothing of the cell is known, however calm the run.
* **Collapsed**: in half of the attention layers and more, at the last measurement, softmax rows have less
  than 0.1 nats of entropy, or more than half of the sigmoid weights exceed 0.99. Their Jacobians vanish, so
  being calm says nothing of the mechanism.
* **Query gradient**: the median over attention layers of the median gradient norm of their query projections
  in the last tenth of the steps. Where heads saturate it vanishes, long before half of the layers have
  collapsed; it has no say in the verdict, which was fixed before that was seen.
* **Healthy run**: it ended neither exploded nor collapsed, and its gain reaches 0.3 nats or 0.2 of the
  variance. (Genes' means alone explain more than 0.2; *learned* asks for more.)

Verdicts, the first that applies: *exploded*; *not finite* (without a sustained explosion before); *too short*
(fewer than 300 steps, or no validation); *failed: collapsed*; *failed: not learned*; *learned*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiments.explosion import EXPLOSION_FACTOR
from experiments.run_records import RecordedRun

BASELINE = slice(100, 300)
SUSTAINED_STEPS = 10
CALM = 10.0
LEAST_GAIN = 0.05
HEALTHY_GAIN = {"cross-entropy, nats": 0.3, "mean squared error": 0.2}
COLLAPSED_ENTROPY = 0.1  # nats
SATURATED_SHARE = 0.5
COLLAPSED_SHARE = 0.5  # of the attention layers

Verdict = Literal[
    "exploded", "not finite", "too short", "failed: collapsed", "failed: not learned", "learned"
]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LongJudgement:
    """A run's row of the ledger; None where there is nothing to say.

    Attributes:
        baseline: See the module's definitions, like the other names.
        has_baseline: Whether it is healthy.
        first_steps: Orders of magnitude.
        peak: Orders of magnitude.
        sustained: Orders of magnitude.
        diverged_at: A step.
        first_layer: A layer's name.
        signals: Attention statistics of that layer's block, last measured before it went.
        train_loss: Mean of the last tenth of the steps.
        validation_loss: At the last validation.
        gain: Nats or share of variance.
        is_healthy: Whether the gain is what a healthy run is asked for.
        collapsed_layers: Share of the attention layers.
        query_gradient: See the module's definitions.
        verdict: See the module's definitions.
    """

    baseline: float | None
    has_baseline: bool
    first_steps: float | None
    peak: float | None
    sustained: float | None
    diverged_at: int | None
    first_layer: str | None
    signals: dict[str, float]
    train_loss: float | None
    validation_loss: float | None
    gain: float | None
    is_healthy: bool
    collapsed_layers: float | None
    query_gradient: float | None
    verdict: Verdict


def judge_long_run(run: RecordedRun) -> LongJudgement:
    """Judge one run by its own past.

    Args:
        run: Gradient norms and losses of every step from the first.

    Returns:
        Its row.

    Source:
        Own definitions, fixed in this module's docstring.
    """
    norms, losses = run.values("grad_norm"), run.values("loss")
    baseline = _median(norms)
    has_baseline = baseline is not None and _is_healthy_past(norms, losses, baseline)
    first_steps = peak = sustained = None
    later = nan_as_infinite(norms[BASELINE.stop :])
    begins: int | None = None
    if baseline is not None:
        first_steps = _orders(nan_as_infinite(norms[: BASELINE.start]).max(), baseline)
        if len(later) >= SUSTAINED_STEPS:
            peak = _orders(later.max(), baseline)
            sustained = _orders(_sustained(later).max(), baseline)
            begins = _first_step(later, baseline * EXPLOSION_FACTOR) if has_baseline else None
    count = min(len(norms), len(losses))
    not_finite = np.flatnonzero(~np.isfinite(norms[:count]) | ~np.isfinite(losses[:count]))
    stops = [step for step in (begins, *not_finite[:1].tolist()) if step is not None]
    validation = [loss for _, loss in run.facts["validation"]]
    gain = gain_of(run, validation[-1]) if validation else None
    collapsed_layers = _collapsed_layers(run)
    has_learned = gain is not None and gain - gain_of(run, run.facts["without_attention"]) >= LEAST_GAIN
    first_layer, went_at = _first_layer(run, sustained)
    verdict: Verdict
    if begins is not None:
        verdict = "exploded"
    elif len(not_finite):
        verdict = "not finite"
    elif len(norms) < BASELINE.stop or gain is None:
        verdict = "too short"
    elif collapsed_layers is not None and collapsed_layers >= COLLAPSED_SHARE:
        verdict = "failed: collapsed"
    elif not has_learned:
        verdict = "failed: not learned"
    else:
        verdict = "learned"
    return LongJudgement(
        baseline=baseline,
        has_baseline=has_baseline,
        first_steps=first_steps,
        peak=peak,
        sustained=sustained,
        diverged_at=min(stops, default=None),
        first_layer=first_layer,
        signals=_signals(run, first_layer, went_at),
        train_loss=float(losses[-max(10, len(losses) // 10) :].mean()) if len(losses) else None,
        validation_loss=validation[-1] if validation else None,
        gain=gain,
        is_healthy=verdict in ("learned", "failed: not learned")
        and gain is not None
        and gain >= HEALTHY_GAIN[run.facts["metric"]],
        collapsed_layers=collapsed_layers,
        query_gradient=_query_gradient(run),
        verdict=verdict,
    )


def _median(norms: FloatArray) -> float | None:
    """Of steps 100 to 300; None where they were not reached, or where it is no positive number."""
    median = float(np.median(norms[BASELINE])) if len(norms) >= BASELINE.stop else 0.0
    return median if 0 < median < np.inf else None


def _is_healthy_past(norms: FloatArray, losses: FloatArray, median: float) -> bool:
    norms, losses = norms[: BASELINE.stop], losses[: BASELINE.stop]
    is_finite = np.isfinite(norms).all() and np.isfinite(losses).all()
    is_calm = norms[BASELINE].max() <= CALM * median
    has_begun_to_learn = losses[-50:].mean() < losses[:10].mean()
    return bool(is_finite and is_calm and has_begun_to_learn)


def nan_as_infinite(norms: FloatArray) -> FloatArray:
    """The same with infinity for whatever is no finite number: it is as large as an explosion can be."""
    return np.where(np.isfinite(norms), norms, np.inf)


def _sustained(norms: FloatArray) -> FloatArray:
    """[len − 9]: the least of each ten consecutive norms."""
    return np.lib.stride_tricks.sliding_window_view(norms, SUSTAINED_STEPS).min(axis=1)


def _first_step(later: FloatArray, level: float) -> int | None:
    """First step from which norms stay at a level; `later` begins at step 300."""
    at_level = np.flatnonzero(_sustained(later) >= level) if len(later) >= SUSTAINED_STEPS else np.empty(0)
    return BASELINE.stop + int(at_level[0]) if len(at_level) else None


def _orders(norm: float, baseline: float) -> float:
    return float(np.log10(max(norm, np.finfo(float).tiny) / baseline))


def gain_of(run: RecordedRun, loss: float) -> float:
    """What a loss knows beyond the run's reference: nats, or share of the variance."""
    reference = run.facts["reference"]
    return reference - loss if run.facts["metric"].startswith("cross-entropy") else 1 - loss / reference


def _first_layer(run: RecordedRun, sustained: float | None) -> tuple[str | None, int]:
    """The layer and the step when it went."""
    if sustained is None or sustained < 1:
        return None, 0
    factor = 10.0 ** int(min(sustained, 4))
    crossings = []
    num_steps = len(run.values("grad_norm"))
    for layer in run.layers("grad_norm"):
        norms = run.values("grad_norm", layer)
        if len(norms) < num_steps:
            continue  # thinned: its positions are no steps
        later = nan_as_infinite(norms[BASELINE.stop :])
        median = float(np.median(norms[BASELINE]))
        if median > 0 and (begins := _first_step(later, factor * median)) is not None:
            excess = later[begins - BASELINE.stop :][:SUSTAINED_STEPS].min() / median
            crossings.append((begins, -float(excess), layer))
    if not crossings:
        return None, 0
    step, _, layer = min(crossings)
    return layer, step


def _signals(run: RecordedRun, layer: str | None, step: int) -> dict[str, float]:
    if layer is None:
        return {}
    block = ".".join(layer.split(".")[:2])
    signals = {}
    for series, (steps, values) in run.series.items():
        is_of_block = series.layer == block or series.layer.startswith(f"{block}.")
        if is_of_block and series.quantity.startswith("attention/") and series.head is None:
            before = values[steps < step]
            if len(before):
                signals[series.quantity] = float(before[-1])
    return signals


def layer_collapses(run: RecordedRun) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Of each attention layer the steps of its measurements, and whether it was collapsed at each."""
    is_softmax = run.facts["config"]["mechanism"] == "softmax"
    quantity = "attention/entropy" if is_softmax else "attention/saturated_share"
    measured = [run.over_steps(quantity, layer) for layer in run.layers(quantity)]
    return [
        (steps, values < COLLAPSED_ENTROPY if is_softmax else values > SATURATED_SHARE)
        for steps, values in measured
    ]


def _collapsed_layers(run: RecordedRun) -> float | None:
    last = [is_collapsed[-1] for _, is_collapsed in layer_collapses(run)]
    return float(np.mean(last)) if last else None


def _query_gradient(run: RecordedRun) -> float | None:
    layers = [layer for layer in run.layers("grad_norm") if layer.endswith("attention.query")]
    norms = [run.values("grad_norm", layer) for layer in layers]
    last = [np.median(values[-max(1, len(values) // 10) :]) for values in norms if len(values)]
    return float(np.median(last)) if last else None
