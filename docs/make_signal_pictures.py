"""Draw each signal of docs/signals healthy beside sick.

    PYTHONPATH=. python docs/make_signal_pictures.py                  # about two minutes on one CPU core
    PYTHONPATH=. python docs/make_signal_pictures.py max_logit        # one picture

Every picture is two short trainings from the fault suite (experiments/detection_suite.py), of one seed and
data: one without a fault, one with. The triangle is where the signal's own detectors speak; all of them
together speak sooner. A fault that they do not hear or put in another layer ends this program with status 1,
and so does an alarm in the healthy run.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image

import probes
from experiments.detection_faults import Fault
from experiments.detection_models import SETUPS
from experiments.detection_recording import Recording, build, train
from experiments.detection_suite import Run
from probes.quantities import QUANTITIES
from stability import SIGMOID_DERIVATIVE_BOUND
from stability.divergence import (
    ALL_LAYERS,
    Alert,
    Detector,
    GradientExplosionDetector,
    LossDetector,
    NonFiniteDetector,
    VanishingGradientDetector,
    WeightJumpDetector,
    dense_coupling_detector,
    entropy_collapse_detector,
    jacobian_growth_detector,
    large_logit_detector,
    logit_growth_detector,
    row_sum_growth_detector,
    saturation_detector,
    update_ratio_detector,
    update_rms_detector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = Path(__file__).parent / "signals" / "images"
STEPS = 130
ONSET = 80

UNITS = {"loss": "nats"}
LABELS = {
    "attention/jacobian_frobenius": "Frobenius norm",
    "attention/jacobian_spectral": "spectral norm",
    "attention/off_diagonal_share": "off-diagonal share",
}


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        quantities: What is drawn, a row each.
        setup: Which training of the fault suite.
        fault: What goes wrong at step `ONSET`.
        detectors: Those that read the signal.
        linear: Quantities on a linear axis; the others' is logarithmic.
        bound: Quantity and value of a line that nothing can pass.
    """

    quantities: tuple[str, ...]
    setup: str
    fault: Fault
    detectors: tuple[Callable[[], Detector], ...]
    linear: tuple[str, ...] = ()
    bound: tuple[str, float] | None = None


GROWING_QUERY_AND_KEY = Fault("qk-growth", "", 1.08, "blocks.2.attention", ONSET)
SATURATING = Fault("saturation", "bias", 0.2, "blocks.1.attention", ONSET)
JACOBIAN_NORMS = (
    "attention/jacobian_frobenius",
    "attention/jacobian_spectral",
    "attention/off_diagonal_share",
)

PICTURES = {
    "gradient_norm": Picture(
        ("grad_norm",),
        "mlp-6-sgd",
        Fault("learning-rate", "", 100, None, ONSET),
        (GradientExplosionDetector,),
    ),
    "loss_spike": Picture(("loss",), "mlp-6-sgd", Fault("bad-batch", "", 100, None, ONSET), (LossDetector,)),
    "attention_entropy": Picture(
        ("attention/entropy",),
        "token-4",
        GROWING_QUERY_AND_KEY,
        (entropy_collapse_detector,),
        linear=("attention/entropy",),
    ),
    "max_logit": Picture(
        ("attention/max_logit",),
        "token-4",
        GROWING_QUERY_AND_KEY,
        (logit_growth_detector, large_logit_detector),
    ),
    "jacobian_norms": Picture(
        JACOBIAN_NORMS,
        "token-4",
        GROWING_QUERY_AND_KEY,
        (dense_coupling_detector, jacobian_growth_detector),
        linear=JACOBIAN_NORMS,
    ),
    "derivative_maximum": Picture(
        ("attention/derivative_max",),
        "cell-sigmoid-3",
        SATURATING,
        (saturation_detector,),
        linear=("attention/derivative_max",),
        bound=("attention/derivative_max", SIGMOID_DERIVATIVE_BOUND),
    ),
    "sigmoid_rows": Picture(
        ("attention/row_sum", "attention/saturated_share"),
        "cell-sigmoid-3",
        SATURATING,
        (saturation_detector, row_sum_growth_detector),
        linear=("attention/saturated_share",),
    ),
    "update_size": Picture(
        ("update_ratio", "adam_update_rms"),
        "token-4",
        Fault("optimizer-state", "scaled", 1e-6, "blocks.1.mlp.hidden", ONSET),
        (update_ratio_detector, update_rms_detector),
    ),
    "weight_norm": Picture(
        ("weight_norm",),
        "token-4",
        Fault("scaled-weights", "", 10, "blocks.1.attention.value", ONSET),
        (WeightJumpDetector,),
    ),
    "activations": Picture(
        ("activation_rms", "grad_norm"),
        "mlp-6-sgd",
        Fault("dying-relu", "sudden", 30, "blocks.2.linear", ONSET),
        (VanishingGradientDetector,),
        linear=("activation_rms", "grad_norm"),
    ),
    "non_finite": Picture(
        ("nonfinite_count",),
        "token-4",
        Fault("nan-weight", "nan", 0, "blocks.2.attention.key", ONSET),
        (NonFiniteDetector,),
    ),
}

ByLayer = dict[str, tuple[list[int], list[float]]]


@cache
def record(setup: str, fault: Fault | None) -> Recording:
    """Trains once, measuring outputs, updates and attention far more often than by default."""
    run = Run(setup, 3000, "constant", STEPS, SETUPS[setup].batch_size, fault)
    model, optimizer = build(run)
    recording = Recording(run)
    with probes.attach(
        model,
        optimizer,
        detectors=[recording],
        activations_every=1,
        details_every=1,
        attention_every=None if setup.startswith("mlp") else 5,
        attention_rows=None,
    ) as probe:
        train(run, model, optimizer, lambda step, loss: probe.log(loss=loss))
    return recording


def series_of(recording: Recording, quantity: str) -> ByLayer:
    """Layer → (steps, values): of outputs the blocks; of what is the whole model's alone, its line."""
    series: ByLayer = {}
    for step, readings in zip(recording.steps, recording.readings, strict=True):
        for layer, value in readings.get(quantity, {}).items():
            steps, values = series.setdefault(layer, ([], []))
            steps.append(step)
            values.append(value)
    if quantity == "activation_rms":
        return {layer: line for layer, line in series.items() if re.fullmatch(r"blocks\.\d+", layer)}
    return {layer: line for layer, line in series.items() if layer != ALL_LAYERS} or series


def verdicts(picture: Picture, recording: Recording) -> list[Alert]:
    """What the signal's own detectors say of a run."""
    return recording.replay([make() for make in picture.detectors])


def draw(picture: Picture, path: Path) -> bool:
    """Draws one picture; tells whether the detectors were right of both runs."""
    from matplotlib.figure import Figure

    healthy, sick = record(picture.setup, None), record(picture.setup, picture.fault)
    alerts = verdicts(picture, sick)
    rows = len(picture.quantities)
    figure = Figure(figsize=(8, 0.9 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, sharex=True, sharey="row", squeeze=False)
    for axes, quantity in zip(grid, picture.quantities, strict=True):
        for one, recording in zip(axes, (healthy, sick), strict=True):
            draw_lines(one, series_of(recording, quantity), picture, quantity)
        axes[0].set_ylabel(label(quantity), fontsize=9)
        mark(axes[1], alerts)
    for one, title in zip(grid[0], ("healthy", f"sick from step {ONSET} on"), strict=True):
        one.set_title(title, fontsize=10, loc="left")
    for one in grid[-1]:
        one.set_xlabel("optimizer step", fontsize=9)
    handles, names = grid[-1][1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("L").quantize(16).save(path, optimize=True)
    print(f"{path.stem}: {alerts[0] if alerts else 'no alert'}")
    return is_told(picture, alerts) and not verdicts(picture, healthy)


def draw_lines(axes: Axes, by_layer: ByLayer, picture: Picture, quantity: str) -> None:
    """A line a layer; the faulty one black, the others grey."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    faulty = picture.fault.layer
    if faulty is not None and faulty not in by_layer:
        faulty = faulty.rpartition(".")[0]  # the block, of what blocks give out
    named = set()
    for layer, (steps, values) in by_layer.items():
        is_faulty = layer == (faulty or ALL_LAYERS)
        name = "loss" if layer == ALL_LAYERS else "layers" if faulty is None else "other layers"
        name = f"{layer} (faulty on the right)" if is_faulty and faulty else name
        is_finite = np.isfinite(values)
        axes.plot(
            np.array(steps)[is_finite],
            np.array(values)[is_finite],
            color="black" if is_faulty else "#a8a8a8",
            linewidth=1.8 if is_faulty else 0.8,
            zorder=3 if is_faulty else 2,
            label="_nolegend_" if name in named else name,
        )
        named.add(name)
    if quantity == "nonfinite_count":
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(-0.2, 1e4)
    elif quantity not in picture.linear:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 1e3:  # powers of ten alone would be one or two labels
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if picture.bound is not None and picture.bound[0] == quantity:
        axes.axhline(picture.bound[1], color="black", linestyle=(0, (6, 3)), linewidth=0.8)
        axes.set_ylim(0, 1.15 * picture.bound[1])
        axes.annotate("bound ¼", (1, picture.bound[1]), fontsize=8, va="bottom")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def mark(axes: Axes, alerts: list[Alert]) -> None:
    """Dots where the fault begins; a triangle where the detectors speak."""
    axes.axvline(ONSET, color="black", linestyle=":", linewidth=1)
    heard = [alert.step for alert in alerts if alert.step >= ONSET][:1]
    axes.plot(
        heard, [1.0] * len(heard), "v", color="black", markersize=7, clip_on=False,
        transform=axes.get_xaxis_transform(), label="alarm",
    )  # fmt: skip


def label(quantity: str) -> str:
    """Name and unit, for an axis."""
    unit = QUANTITIES[quantity].unit if quantity in QUANTITIES else UNITS[quantity]
    name = LABELS.get(quantity, quantity.removeprefix("attention/").replace("_", " "))
    return f"{name}\n({'no unit' if unit == '1' else unit})"


def is_told(picture: Picture, alerts: list[Alert]) -> bool:
    """Whether the first verdict falls on the fault and, where it is a layer's, names it."""
    if not alerts or alerts[0].step < ONSET:
        return False
    layer = picture.fault.layer
    return layer is None or layer == alerts[0].layer or layer.startswith(f"{alerts[0].layer}.")


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description="Draw each signal of docs/signals healthy beside sick.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the pictures go")
    options = parser.parse_args()
    unknown = set(options.names) - set(PICTURES)
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}")
    matplotlib.use("Agg")
    names = options.names or PICTURES
    wrong = [name for name in names if not draw(PICTURES[name], options.images / f"{name}.png")]
    if wrong:
        print(f"The detectors were wrong about {', '.join(wrong)}.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
