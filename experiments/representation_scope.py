"""Which runs may be held against each other, and which data sets a sentence on a claim is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from experiments.cell_transformer import MECHANISMS
from experiments.representation_data import DATASETS
from experiments.representation_plan import best_rate
from experiments.representation_results import RawRun

PLANNED = tuple(name for name, dataset in DATASETS.items() if not dataset.is_control)


@dataclass(frozen=True)
class Scope:
    """What is to be said of data sets beside their numbers.

    Attributes:
        controls: They stand apart.
        planned: The family for which tests and intervals are corrected, whether run or not: the six of the
            plan, or those at hand where these are others.
        missing: Of the family, those without a seed that both mechanisms have.
        unlearned: Those where one mechanism's mean validation loss is not below that without attention:
            nothing follows from them; controls among them.
        at_budget: Those where more than half of the final runs ended by steps and not by patience, controls
            among them.

    Runs of seeds that one mechanism lacks do not count, and decide none of this.
    """

    controls: frozenset[str]
    planned: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unlearned: tuple[str, ...] = ()
    at_budget: tuple[str, ...] = ()

    def remark(self, dataset: str) -> str:
        """What stands behind a data set's name, empty where there is nothing to say."""
        parts = ["control"] if dataset in self.controls else []
        if dataset in self.unlearned:
            parts.append("attention learned nothing here")
        elif dataset in self.at_budget:
            parts.append("at this budget")
        return f" ({', '.join(parts)})" if parts else ""

    def controls_last(self, datasets: Iterable[str]) -> list[str]:
        """Each data set once, in their order but for the controls behind all others."""
        return sorted(dict.fromkeys(datasets), key=lambda name: name in self.controls)

    def remarks(self) -> str:
        """In words, empty where there is nothing to say; of controls no sentence tells."""
        parts = {
            "Missing": self.missing,
            "Not counted, as attention learned nothing there": self.unlearned,
            "At this budget of steps only": self.at_budget,
        }
        told = {what: [name for name in names if name not in self.controls] for what, names in parts.items()}
        return "".join(f" {what}: {', '.join(names)}." for what, names in told.items() if names)


def scope_of(runs: Sequence[RawRun]) -> Scope:
    """What holds of the data sets of some runs.

    Args:
        runs: All.

    Returns:
        The scope.
    """
    controls = frozenset(run.config["dataset"] for run in runs if run.facts.get("is_control"))
    finals: dict[str, list[RawRun]] = {}
    for run in _final(runs):
        finals.setdefault(run.config["dataset"], []).append(run)
    family = tuple(name for name in finals if name not in controls)
    planned = PLANNED if set(family) <= set(PLANNED) else family
    paired = {name: _of_both(found) for name, found in finals.items()}
    return Scope(
        controls,
        planned,
        missing=tuple(name for name in planned if not paired.get(name)),
        unlearned=tuple(name for name, found in paired.items() if found and not _has_learned(found)),
        at_budget=tuple(
            name for name, found in paired.items() if 2 * sum(map(_is_ended_by_steps, found)) > len(found)
        ),
    )


def check_runs(runs: Sequence[RawRun]) -> None:
    """Refuse runs that do not belong together.

    Args:
        runs: All.

    Raises:
        ValueError: The runs of a data set have other cells, types or splits, or the final runs of a mechanism
            on it another learning rate than the runs that tried rates chose.
    """
    for dataset in dict.fromkeys(run.config["dataset"] for run in runs):
        of_dataset = [run for run in runs if run.config["dataset"] == dataset]
        if len({run.config["data_digest"] for run in of_dataset}) > 1:
            raise ValueError(
                f"Expected runs of one set of cells {dataset}; these were prepared with other cells, types "
                "or splits. Report each on its own."
            )
        labels = [run.arrays["labels"] for run in of_dataset if "labels" in run.arrays]
        if any(not np.array_equal(labels[0], other) for other in labels[1:]):
            raise ValueError(f"Expected the same held-out cells in all runs of {dataset}; types differ.")
    chosen = {(row["dataset"], row["mechanism"]): row["chosen"] for row in selections(runs)}
    for run in _final(runs):
        config = run.config
        rate = chosen.get((config["dataset"], config["mechanism"]))
        if rate != config["learning_rate"]:
            raise ValueError(
                f"Expected {config['name']} at the learning rate that was chosen, {rate}; got "
                f"{config['learning_rate']}. Give all runs that tried rates, and those of one plan alone."
            )


def selections(runs: Sequence[RawRun]) -> list[dict[str, Any]]:
    """Validation losses of the tried rates, and the rate that was chosen.

    Args:
        runs: All.

    Returns:
        One entry per data set and mechanism; losses by rate, one a seed.
    """
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        if run.config["purpose"] == "selection":
            key = run.config["dataset"], run.config["mechanism"]
            by_rate = losses.setdefault(key, {})
            by_rate.setdefault(run.config["learning_rate"], []).append(run.facts["validation_loss"])
    rows = []
    for (dataset, mechanism), by_rate in losses.items():
        rate = best_rate(by_rate)
        rows.append(
            {"dataset": dataset, "mechanism": mechanism, "validation_losses": dict(sorted(by_rate.items())),
             "chosen": rate, "is_edge": len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))}
        )  # fmt: skip
    return rows


def _final(runs: Sequence[RawRun]) -> list[RawRun]:
    return [run for run in runs if run.config["purpose"] == "final"]


def _of(runs: Sequence[RawRun], mechanism: str) -> list[RawRun]:
    return [run for run in runs if run.config["mechanism"] == mechanism]


def _of_both(runs: Sequence[RawRun]) -> list[RawRun]:
    """Of the seeds that both mechanisms have."""
    softmax, sigmoid = ({run.config["seed"] for run in _of(runs, mechanism)} for mechanism in MECHANISMS)
    return [run for run in runs if run.config["seed"] in softmax & sigmoid]


def _has_learned(runs: Sequence[RawRun]) -> bool:
    gains = [
        [run.facts["without_attention"] - run.facts["validation_loss"] for run in _of(runs, mechanism)]
        for mechanism in MECHANISMS
    ]
    return all(fmean(found) > 0 for found in gains)


def _is_ended_by_steps(run: RawRun) -> bool:
    return not (run.facts["is_stopped_by_patience"] or run.facts["is_diverged"])
