"""Incident folders: what was seen when a detector spoke, or when training ended other than it should."""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probes import incident_page, rng_states
from probes.alerts import DivergenceError, gravity
from probes.failures import ProbeWarning
from probes.flight_recorder_file import read_steps
from probes.incident_page import Incident
from probes.record import Series, StepRecords
from stability.divergence import Alert, Episode

MAX_INCIDENTS = 8
EPISODE_STEPS = 100
NUM_BATCHES = 16

_UNFINISHED = ".unfinished-"
_KIND_BYTES = 150  # a folder's name may have 255


class IncidentWriter:
    """Writes ``step-000118-gradient-explosion/`` and its like.

    Alerts that follow each other within 100 steps are one episode: the first has a folder, the first event (a
    jump, a spike) after conditions, and the first of divergence after warnings. Of each of these three one
    probe writes eight at most, so that layers that die one by one leave room for what ends the training; the
    end itself may add one. A folder is built under another name and renamed when it is complete.

    Args:
        directory: Where the folders go; created with the first.
        recorder: The flight recorder's file, where the series come from.
    """

    def __init__(self, directory: Path, recorder: Path) -> None:
        self._directory = directory
        self._recorder = recorder
        self._alerts: list[Alert] = []
        self._episodes: dict[tuple[str, str, int | None], Episode] = {}  # by their origin
        self._episode: tuple[int, int] | None = None  # step and gravity of its last alert
        self._num_written: Counter[int] = Counter()  # by gravity
        self._last_step = -1  # which a folder was written for
        self._has_failed = False
        self._batches: deque[tuple[int, np.ndarray]] = deque(maxlen=NUM_BATCHES)
        self._environment = environment()  # now: after a CUDA fault no device tells its name
        self._checkpoint: dict[str, Any] = {}
        self.note_checkpoint(0)
        for folder in directory.glob(f"{_UNFINISHED}*"):  # of a process that was killed while it wrote
            shutil.rmtree(folder, ignore_errors=True)

    def note_checkpoint(self, step: int) -> None:
        """Remembers the random number generators as they are, right before ``step``."""
        if self._episode is not None and step <= self._episode[0]:  # the training goes back to before it
            self._episode = None
        self._last_step = min(self._last_step, step - 1)
        self._checkpoint = {"step": step, "states": rng_states.rng_states()}

    def note_batch(self, step: int, indices: np.ndarray) -> None:
        """Remembers which samples a step trains on; the last 16 batches are kept."""
        self._batches.append((step, indices))

    def see_alerts(
        self, alerts: Sequence[Alert], layers: Sequence[str], episodes: Iterable[Episode] = ()
    ) -> Path | None:
        """Writes a folder if an episode begins.

        Args:
            alerts: The verdicts of one step.
            layers: The model's layers in the order of the forward pass.
            episodes: Those under way, whose consequences the report of the end tells.

        Returns:
            The folder, if one was written.
        """
        self._alerts += alerts
        self._episodes.update({_origin(episode.origin): episode for episode in episodes})
        if not alerts:
            return None
        gravest = max(alerts, key=gravity)
        how_grave = gravity(gravest)
        before = self._episode
        if before is not None and gravest.step - before[0] > EPISODE_STEPS:
            before = None
        self._episode = (gravest.step, max(how_grave, before[1] if before else 0))
        if (before is not None and how_grave <= before[1]) or self._num_written[how_grave] >= MAX_INCIDENTS:
            return None
        self._num_written[how_grave] += 1
        self._last_step = gravest.step
        return self._write(gravest.name, gravest.step, gravest, None, layers)

    def see_end(self, step: int, error: BaseException | None, layers: Sequence[str]) -> None:
        """Writes a folder if the training ends by an exception, or after an alert.

        Args:
            step: The step under way.
            error: The exception; a :class:`~probes.DivergenceError` has a folder already.
            layers: The model's layers in the order of the forward pass.
        """
        if isinstance(error, SystemExit | GeneratorExit):
            error = None
        if isinstance(error, DivergenceError) or (error is None and not self._alerts):
            return
        if error is None and self._last_step >= step - 1:
            return  # the last alert's report tells it all
        # The first of these: what came later is in its report.
        gravest = max(self._alerts, key=gravity, default=None)
        self._write("exit" if error is None else type(error).__name__, step, gravest, error, layers)

    def _write(
        self,
        kind: str,
        step: int,
        alert: Alert | None,
        error: BaseException | None,
        layers: Sequence[str],
    ) -> Path | None:
        if self._has_failed:
            return None
        try:
            folder = self._free_folder(f"step-{step:06d}-{_file_name(kind)}")
            files = self._files(kind, step, alert, error, layers, folder)
            unfinished = self._directory / f"{_UNFINISHED}{os.getpid()}"
            unfinished.mkdir(parents=True)
            try:
                for name, content in files.items():
                    with (unfinished / name).open("wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                unfinished.rename(folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        except Exception as failure:
            self._has_failed = True
            warnings.warn(
                f"the incident at step {step} ({kind}) could not be written, and no later one will be; "
                f"training goes on: {failure!r}",
                ProbeWarning,
                stacklevel=2,
            )
            return None
        return folder

    def _free_folder(self, name: str) -> Path:
        """Where the folder goes; a run that was taken up again may come by the same step a second time."""
        folder, attempt = self._directory / name, 1
        while folder.exists():
            attempt += 1
            folder = self._directory / f"{name}-{attempt}"
        return folder

    def _episode_of(self, alert: Alert) -> Episode | None:
        """What followed from an alert, as far as that is known; of an event after a condition, since then."""
        known = self._episodes.get(_origin(alert))
        if known is not None:
            return known
        for episode in self._episodes.values():
            verdicts = [_origin(verdict) for verdict in episode.consequences]
            if _origin(alert) in verdicts:
                return Episode(alert, episode.consequences[verdicts.index(_origin(alert)) + 1 :])
        return None

    def _files(
        self,
        kind: str,
        step: int,
        alert: Alert | None,
        error: BaseException | None,
        layers: Sequence[str],
        folder: Path,
    ) -> dict[str, bytes]:
        """Name → content; all of it is made before any of it is written."""
        steps = read_steps(self._recorder)
        consequences: tuple[Alert, ...] = ()
        if alert is not None and (episode := self._episode_of(alert)) is not None:
            # Of a step that was left out the detectors have forgotten what its alert tells.
            spread = tuple(dict.fromkeys((*alert.spread, *episode.spread)))
            alert, consequences = replace(alert, spread=spread), episode.consequences
        files = {
            "series.npz": _npz(steps),
            "environment.json": json.dumps(self._environment, indent=2).encode(),
            rng_states.FILE_NAME: _saved({"checkpoint": self._checkpoint}),
        }
        holds = {
            "series.npz": f"{len(steps)} steps in full resolution; probes.read reads them",
            "environment.json": "versions, device and command",
            rng_states.FILE_NAME: f"states of the random number generators right before step "
            f"{self._checkpoint['step']}, the last checkpoint the probe knows of",
        }
        if self._batches:
            batches = [{"step": at, "indices": indices.tolist()} for at, indices in self._batches]
            files["batches.json"] = json.dumps(batches).encode()
            holds["batches.json"] = (
                f"indices of the last {len(batches)} batches, as logged by probe.log_batch"
            )
        incident = Incident(
            kind=kind,
            step=step,
            alert=alert,
            alerts=self._alerts,
            consequences=consequences,
            error=error,
            layers=layers,
            steps=steps,
            environment=self._environment,
            checkpoint_step=self._checkpoint["step"],
            folder=str(folder.absolute()),
            files=holds,
        )
        files["report.md"] = incident_page.markdown(incident).encode(errors="replace")
        files["report.html"] = incident_page.html(incident).encode(errors="replace")
        return files


def environment() -> dict[str, Any]:
    """Versions, device and command. A device is asked for its name only if it is in use."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    try:
        directory = str(Path.cwd())
    except OSError:
        directory = "(deleted)"
    in_use = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "stability-probes": version("stability-probes"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": np.__version__,
        "CUDA": torch.version.cuda,
        "GPU": [torch.cuda.get_device_name(index) for index in in_use],
        "OS": platform.platform(),
        "directory": directory,
        "command": shlex.join(sys.orig_argv),
    }


def _origin(alert: Alert) -> tuple[str, str, int | None]:
    """What an episode's alerts, told as warning and as divergence, have in common."""
    return alert.kind, alert.layer, alert.onset_step


def _npz(steps: Sequence[StepRecords]) -> bytes:
    """One row a value: its step, its value and the index of its tag."""
    numbers: dict[Series, int] = {}
    series = [numbers.setdefault(name, len(numbers)) for records in steps for name in records.series]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        tags=np.array([name.tag for name in numbers], dtype=np.str_),
        tag_indices=np.array(series, dtype=np.int32),
        steps=np.array([records.step for records in steps], dtype=np.int64).repeat(
            [len(records.series) for records in steps]
        ),
        values=np.concatenate([np.empty(0), *(records.values for records in steps)]),
    )
    return buffer.getvalue()


def _saved(states: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def _file_name(kind: str) -> str:
    name = "".join(character if character.isalnum() or character in "-_" else "-" for character in kind)
    return name.encode()[:_KIND_BYTES].decode(errors="ignore")
