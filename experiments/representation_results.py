"""The raw runs of the representation experiment, read back and judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from experiments.embedding_metrics import embedding_metrics
from experiments.run_records import RecordedRun, read_run, run_files

# Attention statistics of a run are means over so many steps before the weights that were kept.
_WINDOW = 100
ATTENTION = (
    "attention/entropy",
    "attention/max_logit",
    "attention/jacobian_spectral",
    "attention/row_sum",
    "attention/saturated_share",
)


ARRAYS = (
    *("embeddings", "embeddings_centre", "untrained", "untrained_centre"),
    *("labels", "groups", "losses", "hidden"),
)


@dataclass(frozen=True)
class RawRun:
    """The file of one run, or of the baseline.

    Attributes:
        facts: Configuration and outcome.
        records: What the probes recorded.
        arrays: Of held-out cells: "embeddings" [cells, dimensions], "labels" and "groups" [cells], and of a
            model "losses" and "hidden" [cells]; "untrained" of the first seeds. The training cells' mean is
            "embeddings_centre" [dimensions]. A run that tried a learning rate has none.
    """

    facts: dict[str, Any]
    records: RecordedRun
    arrays: dict[str, NDArray[Any]]

    @property
    def config(self) -> dict[str, Any]:
        """Of the run."""
        config: dict[str, Any] = self.facts["config"]
        return config


@dataclass(frozen=True)
class Judged:
    """One set of embeddings, judged.

    Attributes:
        dataset: Its name.
        method: "softmax", "sigmoid", each with " untrained" where it is, or "PCA".
        seed: None of the baseline.
        values: Metric → value; of a trained model with its losses and attention statistics.
    """

    dataset: str
    method: str
    seed: int | None
    values: dict[str, float]


def read_raw(paths: Sequence[Path]) -> list[RawRun]:
    """All runs of some files.

    Args:
        paths: Files of runs, archives of them, and folders with either; a run found twice is read once.

    Returns:
        The runs, in the order of their names.

    Raises:
        FileNotFoundError: A path is not there, or there is no run in any.
        ValueError: A file is no run's, two runs of one name differ, or they are of several presets, or final
            runs of several budgets.
    """
    runs: dict[str, RawRun] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"Expected runs (.npz), archives (.zip) or a folder of them at {path}.")
        for name, file in run_files(path):
            try:
                run = _read(file)
            except ValueError as error:
                raise ValueError(f"{name} cannot be read: {error} Leave it out.") from error
            known = runs.setdefault(run.config["name"], run)
            # Facts tell two runs of one configuration apart: a GPU adds in another order each time.
            if json.dumps(known.facts) != json.dumps(run.facts):  # where NaN equals NaN
                raise ValueError(
                    f"Expected one run {run.config['name']}; {path} has another than a file before, with "
                    "other settings, cells or results. Leave one of them out."
                )
    if not runs:
        raise FileNotFoundError(
            f"Expected runs of `experiments.representations`; found none in {', '.join(map(str, paths))}."
        )
    if len({str(run.config["model"]) for run in runs.values() if "model" in run.config}) > 1:
        raise ValueError("Expected runs of one preset; these are of several. Report each on its own.")
    finals = [run.config for run in runs.values() if run.config["purpose"] == "final"]
    if len({config.get("steps") for config in finals}) > 1:  # the pilot's were cut short
        raise ValueError("Expected final runs of one budget of steps; these have several. Leave others out.")
    return [runs[name] for name in sorted(runs)]


def judge(run: RawRun) -> list[Judged]:
    """The metrics of a run's embeddings, before and after training.

    Args:
        run: Any; one that tried a learning rate has none.

    Returns:
        One entry per set of embeddings.

    Raises:
        ValueError: Embeddings that cannot be judged, with the run's name.
    """
    if "embeddings" not in run.arrays:
        return []
    config = run.config
    found = _metrics(run, "embeddings")
    if config["purpose"] == "baseline":
        return [Judged(config["dataset"], "PCA", None, found)]
    dataset, mechanism, seed = config["dataset"], config["mechanism"], config["seed"]
    found |= {name: run.facts[name] for name in ("held_out_loss", "validation_loss")}
    judged = [Judged(dataset, mechanism, seed, found | attention_statistics(run))]
    if "untrained" in run.arrays:
        judged.append(Judged(dataset, f"{mechanism} untrained", seed, _metrics(run, "untrained")))
    return judged


def attention_statistics(run: RawRun) -> dict[str, float]:
    """Means over layers and the last steps before the weights that were kept.

    Args:
        run: A trained one.

    Returns:
        Quantity → mean; quantities that the mechanism does not have are left out.
    """
    best = max(run.facts["best_step"], 1)  # so many steps led to the weights; the first is step 0
    found = {}
    for quantity in ATTENTION:
        values = [
            values[(steps < best) & (steps >= best - _WINDOW)]
            for series, (steps, values) in run.records.series.items()
            if series.quantity == quantity and series.head is None
        ]
        if values and sum(map(len, values)):
            found[quantity] = float(np.concatenate(values).mean(dtype=np.float64))
    return found


def _read(file: IO[bytes]) -> RawRun:
    records = read_run(file)
    file.seek(0)
    with np.load(file) as content:
        arrays = {name: content[name] for name in ARRAYS if name in content}
    return RawRun(records.facts, records, arrays)


def _metrics(run: RawRun, name: str) -> dict[str, float]:
    try:
        return embedding_metrics(run.arrays[name], run.arrays["labels"], run.arrays[f"{name}_centre"])
    except ValueError as error:
        raise ValueError(f"{run.config['name']}, {name}: {error}") from error
