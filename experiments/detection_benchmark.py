"""The fault suite: is a tool told of a fault, when, of which layer, and how often does it cry wolf?

Small models are trained with a fault of a known kind, layer and step, beside fault-free runs of the same seed
and data and long clean runs under several schedules. `record` trains and keeps what detectors receive;
`score` replays that to the detectors in seconds.

    python -m experiments.detection_benchmark record --half tuning       # about 6 minutes on a core
    python -m experiments.detection_benchmark score --half tuning
    python -m experiments.detection_benchmark record --half scoring      # about 25 minutes; can be resumed
    python -m experiments.detection_benchmark score --half scoring
    python -m experiments.detection_benchmark peers --half scoring       # experiments/detection_peers.py

One file a run; those that exist are kept. Rules and results: docs/detection.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.command_line import (
    add_threads,
    experiment_parser,
    fail,
    progress_bar,
    report_console,
    run_facts,
    write_json,
)
from experiments.detection_peers import installed_peers, peer_runs, peer_verdicts
from experiments.detection_recording import Recording, record
from experiments.detection_report import (
    HEADINGS,
    TOOL_HEADINGS,
    Result,
    cases,
    draw_figure,
    false_alarm_line,
    markdown_table,
    result_of,
    rows,
    score_table,
    summary,
    tools_rows,
    tools_table,
)
from experiments.detection_scoring import Verdict, departures
from experiments.detection_suite import Half, Run, suite
from stability.divergence import Detector, default_detectors

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_DIRECTORY = Path("runs/detection")
VERDICT_LATENCY = 1  # a probe judges the numbers of a step when the next recorded step ends


def recording_path(directory: Path, run: Run) -> Path:
    """Where the recording of a run lies."""
    return directory / f"{run.name}.npz"


def record_half(half: Half, directory: Path, console: Console) -> None:
    """Trains every run of a half that has no recording yet.

    Args:
        half: Which.
        directory: Of the recordings.
        console: Shows what is done and how long the rest will take.

    Raises:
        OSError: `directory` cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [run for run in suite(half) if not recording_path(directory, run).exists()]
    with progress_bar(console) as progress:
        task = progress.add_task(f"{len(missing)} runs, steps", total=sum(run.steps for run in missing))
        for run in missing:
            recording, _ = record(run)
            recording.save(recording_path(directory, run))
            progress.advance(task, run.steps)


def load_half(half: Half, directory: Path) -> dict[Run, Recording]:
    """All recordings of a half.

    Args:
        half: Which.
        directory: Of the recordings.

    Raises:
        FileNotFoundError: Some are missing; says how to make them.
    """
    runs = suite(half)
    missing = sum(not recording_path(directory, run).exists() for run in runs)
    if missing:
        raise FileNotFoundError(
            f"{missing} of {len(runs)} recordings are missing in {directory}; make them with "
            f"`python -m experiments.detection_benchmark record --half {half} --out {directory}`."
        )
    return {run: Recording.load(recording_path(directory, run)) for run in runs}


def judge(
    recordings: Mapping[Run, Recording],
    detectors: Callable[[], Sequence[Detector]] = default_detectors,
    without: Collection[str] = (),
) -> dict[Run, list[Verdict]]:
    """What detectors say of recorded runs.

    Args:
        recordings: The runs.
        detectors: Makes fresh ones for each run.
        without: Quantities that are withheld from them.
    """
    return {
        run: [
            Verdict(alert.step, alert.step + VERDICT_LATENCY, alert.layer, str(alert))
            for alert in recording.replay(detectors(), without)
        ]
        for run, recording in recordings.items()
    }


def report(
    result: Result, files: Path, console: Console, *, facts: Mapping[str, Any], with_cases: bool
) -> None:
    """Prints a score and writes it as .json, .md and .png.

    Args:
        result: What was scored.
        files: Where to write, without the extension.
        console: Shows the table.
        facts: What to keep beside the scores.
        with_cases: Whether to list every miss, wrong layer and false alarm.
    """
    console.print(score_table(result))
    if with_cases:
        console.print("\n".join(cases(result)), highlight=False, markup=False, soft_wrap=True)
    write_json(files.with_suffix(".json"), {**facts, **summary(result)})
    table = markdown_table(HEADINGS, rows(result))
    files.with_suffix(".md").write_text(f"{table}\n{false_alarm_line(result)}\n", encoding="utf-8")
    draw_figure(files.with_suffix(".png"), result)
    console.print(f"Written: {files}.json, .md and .png.", soft_wrap=True)


def compare_peers(
    half: Half, directory: Path, console: Console, facts: Callable[[], Mapping[str, Any]]
) -> None:
    """Runs other tools on some runs of a recorded half; prints and writes `peers.json` and `peers.md`.

    Args:
        half: Which.
        directory: Of the recordings; what peers said is kept in `peers` there.
        console: Shows progress and table.
        facts: Answers with what to keep beside the scores.

    Raises:
        FileNotFoundError: Recordings are missing.
    """
    recordings = load_half(half, directory)
    losses = {run: recording.losses for run, recording in recordings.items()}
    when_lost = departures(losses)
    runs = peer_runs(suite(half))
    results = [result_of("stability-probes", judge({run: recordings[run] for run in runs}), when_lost)]
    packages, reasons = installed_peers()
    (directory / "peers").mkdir(exist_ok=True)
    with progress_bar(console) as progress:
        task = progress.add_task("peers, runs", total=len(packages) * len(runs))
        for name, package in packages.items():
            verdicts = {}
            for run in runs:
                path = directory / "peers" / f"{name}_{run.name}.json"
                if not path.exists():
                    said = peer_verdicts(name, package, run)
                    path.write_text(json.dumps([asdict(verdict) for verdict in said]), encoding="utf-8")
                verdicts[run] = [Verdict(**content) for content in json.loads(path.read_text("utf-8"))]
                progress.advance(task)
            label = f"{name} {version(name)}"
            results.append(result_of(label, verdicts, when_lost))
    console.print(tools_table(results, title=f"{len(runs)} runs of the {half} half"))
    for name, reason in reasons.items():
        console.print(f"{name} was not compared: {reason}", markup=False)
    content = {
        **facts(),
        "half": half,
        "not_compared": reasons,
        "tools": [summary(result) for result in results],
    }
    write_json(directory / "peers.json", content)
    (directory / "peers.md").write_text(markdown_table(TOOL_HEADINGS, tools_rows(results)), encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("detection_benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, flag in (
        ("record", "train the runs and keep what detectors receive", "--out"),
        ("score", "replay recordings to the detectors", "--in"),
        ("peers", "run other tools on some of the recorded runs", "--in"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--half", choices=("tuning", "scoring"), required=True, help="which runs")
        command.add_argument(
            flag,
            dest="directory",
            type=Path,
            help=f"directory of the recordings (default {DEFAULT_DIRECTORY}/HALF)",
        )
        if name != "score":
            add_threads(command)
            continue
        command.add_argument("--cases", action="store_true", help="list misses, wrong layers, false alarms")
        command.add_argument(
            "--without",
            nargs="+",
            default=[],
            metavar="QUANTITY",
            help="withhold quantities from the detectors, such as weight_norm",
        )
    options = parser.parse_args(arguments)
    options.directory = options.directory or DEFAULT_DIRECTORY / options.half
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or score. Exit status: 0, 130 after Ctrl-C, 2 if recordings cannot be written or read."""
    options = parse_arguments(arguments)
    console = report_console()
    if options.command != "score":
        torch.set_num_threads(options.threads)
    started = time.time()
    try:
        if options.command == "record":
            record_half(options.half, options.directory, console)
        elif options.command == "peers":
            compare_peers(options.half, options.directory, console, partial(_facts, arguments, started))
        else:
            recordings = load_half(options.half, options.directory)
            verdicts = judge(recordings, without=options.without)
            losses = {run: recording.losses for run, recording in recordings.items()}
            result = result_of("stability-probes", verdicts, departures(losses))
            facts = {**_facts(arguments, started), "half": options.half, "without": options.without}
            name = "-".join(["score", *(f"without-{q.replace('/', '-')}" for q in options.without)])
            report(result, options.directory / name, console, facts=facts, with_cases=options.cases)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on where it stopped.")
        return 130
    except OSError as error:
        return fail("detection_benchmark", error)
    return 0


def _facts(arguments: Sequence[str] | None, started: float) -> dict[str, Any]:
    return {"schema_version": 1, **run_facts("detection_benchmark", arguments, started)}


if __name__ == "__main__":
    sys.exit(main())
