"""The fault suite: is a tool told of a fault, when, of which layer, and how often does it cry wolf?

Small models are trained with a fault of a known kind, layer and step, beside fault-free runs of the same seed
and data and long clean runs under several schedules. `record` trains and keeps what detectors receive;
`score` replays that to the detectors in seconds.

    python -m experiments.detection_benchmark record --half tuning       # about 6 minutes on a core
    python -m experiments.detection_benchmark score --half tuning
    python -m experiments.detection_benchmark record --half scoring      # about 25 minutes; can be resumed
    python -m experiments.detection_benchmark score --half scoring

One file a run; those that exist are kept. Rules and results: docs/detection.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from experiments.command_line import positive_int, report_console
from experiments.detection_recording import record
from experiments.detection_suite import Half, Run, suite

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_DIRECTORY = Path("runs/detection")


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    directory.mkdir(parents=True, exist_ok=True)
    missing = [run for run in suite(half) if not recording_path(directory, run).exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task(f"{len(missing)} runs, steps", total=sum(run.steps for run in missing))
        for run in missing:
            recording, _ = record(run)
            recording.save(recording_path(directory, run))
            progress.advance(task, run.steps)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        The settings; argparse exits with status 2 on a bad one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.detection_benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text, flag in (
        ("record", "train the runs and keep what detectors receive", "--out"),
        ("score", "replay recordings to the detectors", "--in"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("--half", choices=("tuning", "scoring"), required=True, help="which runs")
        command.add_argument(
            flag,
            dest="directory",
            type=Path,
            help=f"directory of the recordings (default {DEFAULT_DIRECTORY}/HALF)",
        )
        if name == "record":
            command.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    options.directory = options.directory or DEFAULT_DIRECTORY / options.half
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or score.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        Exit status: 0, 130 after Ctrl-C, 2 if recordings cannot be written or read.
    """
    options = parse_arguments(arguments)
    console = report_console()
    try:
        if options.command == "record":
            torch.set_num_threads(options.threads)
            record_half(options.half, options.directory, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on where it stopped.")
        return 130
    except OSError as error:
        print(f"detection_benchmark: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
