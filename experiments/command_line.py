"""What the experiments' command lines share: flags, the console, the end on bad input, the head of a summary.

Every `main` and `parse_arguments` takes the command line without the program name; None reads `sys.argv`.
`main` returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def experiment_parser(experiment: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, as it is written there.

    Args:
        experiment: Name of the module in `experiments`.
        description: Its docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a positive, finite number."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text}")
    return value


def add_device(parser: argparse.ArgumentParser, default: str = "cpu", help_text: str = "default cpu") -> None:
    """The flag --device; `check_device` looks at what it was given."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help=help_text)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program with status 2 where the device that was asked for is not there.

    Args:
        parser: Prints the message.
        device: "cpu" or "cuda".
    """
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda needs a CUDA device; torch.cuda.is_available() is False. Use --device cpu."
        )


def add_threads(parser: argparse.ArgumentParser, help_text: str = "CPU threads (default 1)") -> None:
    """The flag --threads, for `torch.set_num_threads`."""
    parser.add_argument("--threads", type=positive_int, default=1, help=help_text)


def fail(experiment: str, reason: object) -> int:
    """Says on stderr why an experiment cannot run.

    Args:
        experiment: Name of the module in `experiments`.
        reason: An error or a sentence.

    Returns:
        The exit status, 2.
    """
    print(f"{experiment}: {reason}", file=sys.stderr)
    return 2


def report_console() -> Console:
    """A console for wide tables; a log file has no width of its own, and rich would fold them."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=150)


def progress_bar(console: Console) -> Progress:
    """A bar with count and remaining time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, speed_estimate_period=120)


def run_facts(
    experiment: str, arguments: Sequence[str] | None, started: float, device: str = "cpu"
) -> dict[str, Any]:
    """The head of a summary: how to repeat a run, when, how long and on what it ran.

    Args:
        experiment: Name of the module in `experiments`.
        arguments: Its command line without the program name; None reads `sys.argv`.
        started: When it began, in seconds since the epoch.
        device: "cpu" or "cuda".

    Returns:
        command; started, in UTC; seconds until now; versions, hardware and commit.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["python", "-m", f"experiments.{experiment}", *given]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        **provenance(device),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write standard JSON; non-finite numbers become the strings "NaN", "Infinity" and "-Infinity".

    Args:
        path: The file to write.
        content: Dictionaries, lists, tuples and plain values.
    """
    path.write_text(json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
