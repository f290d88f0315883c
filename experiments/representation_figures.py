"""Figures of the representation experiment: paired differences, and held-out cells side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.paired_comparison import Comparison
from experiments.representation_findings import interval_level
from experiments.representation_results import RawRun
from experiments.representation_scope import Scope

# Embeddings and types, as they are in a run.
Picture = tuple[Any, Any]
PANELS = ("PCA", "softmax untrained", "softmax", "sigmoid")


def draw_differences(path: Path, comparisons: dict[str, list[Comparison]], scope: Scope) -> None:
    """Sigmoid less softmax on each data set with its interval, one panel a metric.

    Args:
        path: A .png or .svg file.
        comparisons: Title of a panel → what it shows.
        scope: Its remarks stand behind the names: which are controls, and which do not count.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    rows = max(len(found) for found in comparisons.values())
    figure = Figure(figsize=(11, 1.6 + 0.35 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for panel, (title, found) in zip(
        figure.subplots(1, len(comparisons), sharey=True), comparisons.items(), strict=True
    ):
        panel.axvline(0.0, color="0.4", linewidth=1)
        for row, each in enumerate(found):
            color = {"undecided": "0.6", "higher": "black", "lower": "black"}[each.verdict]
            panel.plot([each.low, each.high], [row, row], color=color, linewidth=1.5)
            panel.plot(each.difference, row, "o", color=color)
        panel.set_yticks(range(len(found)), [each.dataset + scope.remark(each.dataset) for each in found])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("sigmoid less softmax", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)  # numbers of five digits would touch
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.suptitle(
        f"Mean paired differences, intervals over seeds at {interval_level(scope)}; "
        "grey: undecided (Holm; a control by itself)",
        fontsize=10,
    )
    figure.savefig(path)


def draw_embeddings(path: Path, runs: Sequence[RawRun]) -> None:
    """Held-out cells in two dimensions by t-SNE, one row a data set, of the first seed that both have.

    Args:
        path: A .png or .svg file.
        runs: All.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        dataset: found
        for dataset, found in _by_dataset(runs).items()
        if {"softmax", "sigmoid"} <= found.keys()
    }
    if not shown:
        return
    controls = {run.config["dataset"] for run in runs if run.facts.get("is_control")}
    figure = Figure(figsize=(12, 3.1 * len(shown)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for row, (dataset, found) in zip(
        figure.subplots(len(shown), len(PANELS), squeeze=False), shown.items(), strict=True
    ):
        remark = " (control)" if dataset in controls else ""
        for panel, name in zip(row, PANELS, strict=True):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_title(f"{dataset}{remark}, {name}" if name == PANELS[0] else name, fontsize=8)
            if name in found and found[name][0] is not None:
                _scatter(panel, *found[name])
        panel.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    figure.suptitle("Held-out cells by t-SNE, coloured by type; the first seed", fontsize=10)
    figure.savefig(path)


def _by_dataset(runs: Sequence[RawRun]) -> dict[str, dict[str, Picture]]:
    """Data set → panel → embeddings and types, of the lowest seed that both mechanisms have."""
    final = {
        (run.config["dataset"], run.config["mechanism"], run.config["seed"]): run
        for run in runs
        if run.config["purpose"] == "final"
    }
    pictures: dict[str, dict[str, Picture]] = {}
    for dataset, _, seed in sorted(final):
        softmax, sigmoid = (final.get((dataset, mechanism, seed)) for mechanism in ("softmax", "sigmoid"))
        if dataset not in pictures and softmax is not None and sigmoid is not None:
            pictures[dataset] = {
                "softmax untrained": (softmax.arrays.get("untrained"), softmax.arrays["labels"]),
                "softmax": (softmax.arrays["embeddings"], softmax.arrays["labels"]),
                "sigmoid": (sigmoid.arrays["embeddings"], sigmoid.arrays["labels"]),
            }
    for run in runs:
        if run.config["purpose"] == "baseline" and run.config["dataset"] in pictures:
            pictures[run.config["dataset"]]["PCA"] = (run.arrays["embeddings"], run.arrays["labels"])
    return pictures


def _scatter(panel: Any, embeddings: NDArray[Any], types: NDArray[np.str_]) -> None:
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(types) - 1) / 3)
    places = TSNE(perplexity=perplexity, random_state=0).fit_transform(embeddings.astype(np.float32))
    names = np.unique(types)
    for name, colour in zip(names, type_colours(len(names)), strict=True):
        chosen = types == name
        panel.scatter(*places[chosen].T, s=4, color=colour, label=name, linewidths=0)


def type_colours(count: int) -> list[Any]:
    """So many colours, no two alike: the usual twenty, then twenty more, then a rainbow."""
    from matplotlib import colormaps

    usual = [colormaps[name](i) for name in ("tab20", "tab20b") for i in range(20)]
    return usual[:count] if count <= len(usual) else [colormaps["hsv"](i / count) for i in range(count)]
