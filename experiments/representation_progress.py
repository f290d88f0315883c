"""How far the plan of the representation experiment is: which runs are known by now, and which are finished.

A machine is lent for half an hour and the plan takes several. What a machine leaves besides its archives is a
small file with the finished runs, and the next one is given it: it repeats none of them, and takes the
learning rates that they chose.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.cell_transformer import MECHANISMS
from experiments.command_line import write_json
from experiments.long_run import RunPaths, finished_facts
from experiments.representation_plan import (
    SCALES,
    RepresentationConfig,
    best_rate,
    further_rates,
    pairs,
    run_config,
    selection_runs,
)
from experiments.run_records import read_facts, run_files

# Lowest validation loss of a run; None of one that is not finished.
LossOf = Callable[[RepresentationConfig], float | None]


@dataclass(frozen=True)
class Plan:
    """Which runs there are.

    Attributes:
        scale: A key of `SCALES`.
        digests: Data set → its digest, of the prepared file.
        num_seeds: Final runs of each data set and mechanism.
    """

    scale: str
    digests: dict[str, str]
    num_seeds: int

    def known(self, loss_of: LossOf) -> Iterator[RepresentationConfig]:
        """The runs that can be named by now: of final ones, those whose learning rate has been chosen.

        Args:
            loss_of: Validation loss of a run.

        Yields:
            Runs in order: tried rates first, then seed by seed, so that what is cut is the last seeds of all.
        """
        chosen: dict[str, dict[str, float]] = {}
        for dataset in self.digests:
            runs, chosen[dataset] = self._selection(dataset, loss_of)
            yield from runs
        first = SCALES[self.scale].first_seed
        for seed in range(first, first + self.num_seeds):
            for dataset, mechanism in pairs(list(self.digests)):
                if (rate := chosen[dataset].get(mechanism)) is not None:
                    yield run_config(
                        self.scale, dataset, mechanism, "final",
                        seed=seed, learning_rate=rate, data_digest=self.digests[dataset],
                    )  # fmt: skip

    def size(self, loss_of: LossOf) -> int:
        """Number of runs as far as is known: a best rate at an edge adds to it."""
        tried = sum(config.purpose == "selection" for config in self.known(loss_of))
        return tried + len(self.digests) * len(MECHANISMS) * self.num_seeds

    def _selection(
        self, dataset: str, loss_of: LossOf
    ) -> tuple[list[RepresentationConfig], dict[str, float]]:
        """The runs that try rates on a data set, and the rate of each mechanism if they all are finished."""
        scale, digest = SCALES[self.scale], self.digests[dataset]
        runs: list[RepresentationConfig] = []
        losses: dict[str, dict[float, list[float]]] = {mechanism: {} for mechanism in MECHANISMS}
        rates = list(scale.first_rates)
        while True:
            for _, mechanism in pairs([dataset]):
                for rate in rates:
                    trials = selection_runs(self.scale, dataset, mechanism, rate, digest)
                    found = [loss_of(config) for config in trials]
                    losses[mechanism][rate] = [loss for loss in found if loss is not None]
                    runs += trials
            if any(len(each) < scale.selection_seeds for tried in losses.values() for each in tried.values()):
                return runs, {}
            best = {mechanism: best_rate(tried) for mechanism, tried in losses.items()}
            if not (rates := further_rates(scale.rates, losses["softmax"], best.values())):
                return runs, {mechanism: rate for mechanism, rate in best.items() if rate is not None}


class Progress:
    """The finished runs, of this machine and of those before it.

    Args:
        work: Folder of this machine's runs.
        done: What machines before left: files of `write`, or archives with their runs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another file.
    """

    def __init__(self, work: Path, done: Sequence[Path] = ()) -> None:
        self.work = work
        self.unusable: dict[str, str] = {}
        self._before = {name: entry for path in done for name, entry in _read(path).items()}
        self._here: dict[str, dict[str, Any]] = {}

    def validation_loss(self, config: RepresentationConfig) -> float | None:
        """Lowest validation loss of a run.

        A file that cannot be used, or is of another configuration, counts as none; the reason is printed and
        kept in `unusable`.

        Args:
            config: The run.

        Returns:
            The loss; None if the run is not finished.
        """
        if config.name in self.unusable:
            return None
        try:
            entry = self._entry(config)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            self.unusable[config.name] = str(error)
            print(f"{config.name}: cannot be used: {error}", flush=True)
            return None
        return None if entry is None else float(entry["validation_loss"])

    def write(self, path: Path, carried: Iterable[str]) -> None:
        """Write which runs need not be repeated; a file that is there is replaced in one go.

        Args:
            path: A .json file.
            carried: Names of this machine's runs whose files are in an archive: the others die with it.
        """
        names = set(carried)
        temporary = path.with_suffix(".partial")
        write_json(temporary, self._before | {k: v for k, v in self._here.items() if k in names})
        os.replace(temporary, path)

    def _entry(self, config: RepresentationConfig) -> dict[str, Any] | None:
        if (entry := self._before.get(config.name)) is not None:
            if entry["config"] != json.loads(json.dumps(asdict(config))):
                raise ValueError(
                    "--done names it with another configuration than the plan's. Take the prepared cells and "
                    "the version of that run, or leave --done out and begin anew."
                )
            return entry
        if config.name not in self._here and RunPaths.of(config.name, self.work).records.exists():
            facts = finished_facts(config, self.work)
            if facts is not None:
                self._here[config.name] = _what_counts(facts)
        return self._here.get(config.name)


def _what_counts(facts: dict[str, Any]) -> dict[str, Any]:
    """Of a finished run: what tells whether it is the plan's, and what chooses a rate."""
    return {"config": facts["config"], "validation_loss": facts["validation_loss"]}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if path.suffix == ".zip":
        of_runs = [read_facts(file) for _, file in run_files(path)]
        return {
            facts["config"]["name"]: _what_counts(facts) for facts in of_runs if "validation_loss" in facts
        }
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all({"config", "validation_loss"} <= entry.keys() for entry in content.values()):
            return dict(content)
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"Expected in {path} the finished runs as an earlier call wrote them; got another file.")
