"""The raw runs of the representation experiment, read back and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from experiments.embedding_metrics import embedding_metrics
from experiments.run_records import RecordedRun, read_run, run_files

# Attention statistics of a run are means over so many steps up to the one whose weights were kept.
_WINDOW = 100
ATTENTION = (
    "attention/entropy",
    "attention/max_logit",
    "attention/jacobian_spectral",
    "attention/row_sum",
    "attention/saturated_share",
)


@dataclass(frozen=True)
class RawRun:
    """The file of one run, or of the baseline.

    Attributes:
        facts: Configuration and outcome.
        records: What the probes recorded.
        embeddings: [held-out cells, dimensions]; None of a run that tried a learning rate.
        untrained: The same by the initial weights; None of the baseline too.
        labels: [held-out cells] types; None where embeddings are.
    """

    facts: dict[str, Any]
    records: RecordedRun
    embeddings: NDArray[np.floating] | None
    untrained: NDArray[np.floating] | None
    labels: NDArray[np.str_] | None

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
        ValueError: A file is no run's, or they are of several presets.
    """
    runs: dict[str, RawRun] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"Expected runs (.npz), archives (.zip) or a folder of them at {path}.")
        for _, file in run_files(path):
            run = _read(file)
            runs[run.config["name"]] = run
    if not runs:
        raise FileNotFoundError(
            f"Expected runs of `experiments.representations`; found none in {', '.join(map(str, paths))}."
        )
    if len({str(run.config["model"]) for run in runs.values() if "model" in run.config}) > 1:
        raise ValueError("Expected runs of one preset; these are of several. Report each on its own.")
    return [runs[name] for name in sorted(runs)]


def judge(run: RawRun) -> list[Judged]:
    """The metrics of a run's embeddings, before and after training.

    Args:
        run: Any; one that tried a learning rate has none.

    Returns:
        One entry per set of embeddings.
    """
    if run.embeddings is None:
        return []
    assert run.labels is not None
    config = run.config
    if config["purpose"] == "baseline":
        return [Judged(config["dataset"], "PCA", None, embedding_metrics(run.embeddings, run.labels))]
    assert run.untrained is not None
    place = config["dataset"], config["mechanism"], config["seed"]
    losses = {name: run.facts[name] for name in ("held_out_loss", "validation_loss")}
    trained = {
        **embedding_metrics(run.embeddings, run.labels),
        **losses,
        **attention_statistics(run),
    }
    untrained = embedding_metrics(run.untrained, run.labels)
    return [Judged(*place, trained), Judged(place[0], f"{place[1]} untrained", place[2], untrained)]


def attention_statistics(run: RawRun) -> dict[str, float]:
    """Means over layers and the last steps before the weights that were kept.

    Args:
        run: A trained one.

    Returns:
        Quantity → mean; quantities that the mechanism does not have are left out.
    """
    last = max(run.facts["best_step"], 1)
    found = {}
    for quantity in ATTENTION:
        values = [
            values[(steps <= last) & (steps > last - _WINDOW)]
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
        embeddings, untrained, labels = (content.get(name) for name in ("embeddings", "untrained", "labels"))
    return RawRun(records.facts, records, embeddings, untrained, labels)
