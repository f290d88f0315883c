"""What a measurement of training speed amounts to: ratios, Amdahl's prediction beside them, tables.

A ratio's interval is of one process; what differs from process to process is in none. Of several, with the
lowest and the highest ratio:

    python -m experiments.training_speed_report results/speed-*/training_speed.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.command_line import experiment_parser
from experiments.overhead_report import paired_ratio

# Beyond this, measured and predicted ratio want an explanation.
EXPLAINED = 0.03


@dataclass(frozen=True)
class Speed:
    """One contender in one case.

    Attributes:
        name: The contender.
        kind: "ours" or "softmax".
        milliseconds: Median of a step.
        tokens_per_second: Valid tokens, padding not counted.
        attention_milliseconds: Attention of all layers, forward and backward, by itself, on the GPU.
        attention_share: Of the step's time.
        gpu_milliseconds: What the GPU computes of a step; the rest it waits for its host. None on the CPU.
        attention_in_step: Milliseconds of these in attention's own kernels. None on the CPU.
        turns: Milliseconds a step, round by round.
    """

    name: str
    kind: str
    milliseconds: float
    tokens_per_second: float
    attention_milliseconds: float
    attention_share: float
    gpu_milliseconds: float | None
    attention_in_step: float | None
    turns: list[float]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast sigmoid trains.

    Attributes:
        ours: Sigmoid's contender.
        softmax: Softmax's.
        is_best: Whether that is the fastest softmax of the case.
        ratio: Softmax's time over ours, median over rounds; above 1 sigmoid is faster.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        gpu_ratio: Of what the GPU computes of a step: the ratio for a host that keeps up. None on the CPU.
        predicted: By Amdahl's law from softmax's step, on a GPU what it computes of it, and the attention
            times of both.
        gap: Measured over predicted, less 1.
        needs_explanation: Whether the gap exceeds 3 %, and that of `gpu_ratio` as well: it is then no waiting
            for the host.
    """

    ours: str
    softmax: str
    is_best: bool
    ratio: float
    low: float
    high: float
    gpu_ratio: float | None
    predicted: float
    gap: float
    needs_explanation: bool


def amdahl(step: float, attention: float, other_attention: float) -> float:
    """Speed-up when a part of a step takes another time: 1 / (1 − share · (1 − other / part)).

    Args:
        step: Time of the step.
        attention: Time of the part in it.
        other_attention: What the part would take.

    Returns:
        The step's time over that with the other part.

    Source:
        Amdahl, AFIPS 30:483 (1967).

    Example:
        >>> amdahl(step=100.0, attention=40.0, other_attention=20.0)
        1.25
    """
    return step / (step - attention + other_attention)


def ratios(speeds: Sequence[Speed]) -> list[Ratio]:
    """Each sigmoid against each softmax of a case.

    Args:
        speeds: Of `measure_case`.

    Returns:
        One entry a pair.
    """
    softmax = [speed for speed in speeds if speed.kind == "softmax"]
    best = min(softmax, key=lambda speed: speed.milliseconds, default=None)
    found = []
    for ours in (speed for speed in speeds if speed.kind == "ours"):
        for theirs in softmax:
            ratio, low, high = paired_ratio(np.array(theirs.turns), np.array(ours.turns))
            step, gpu_ratio = theirs.milliseconds, None
            if theirs.gpu_milliseconds is not None and ours.gpu_milliseconds is not None:
                step = theirs.gpu_milliseconds
                gpu_ratio = step / ours.gpu_milliseconds
            predicted = amdahl(step, theirs.attention_milliseconds, ours.attention_milliseconds)
            gap = ratio / predicted - 1
            computed = gap if gpu_ratio is None else gpu_ratio / predicted - 1
            found.append(
                Ratio(
                    ours.name, theirs.name, theirs is best, ratio, low, high,
                    gpu_ratio, predicted, gap, min(abs(gap), abs(computed)) > EXPLAINED,
                )
            )  # fmt: skip
    return found


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Tables of what was measured.

    Args:
        results: As in the JSON.

    Returns:
        Markdown.
    """
    lines = [
        "| case | contender | ms a step | on the GPU | its attention | alone | valid tokens a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines += [
            f"| {result['case']} | {speed['name']} | {speed['milliseconds']:.2f} | "
            f"{_or_dash(speed['gpu_milliseconds'], '.2f')} | {_or_dash(speed['attention_in_step'], '.2f')} | "
            f"{speed['attention_milliseconds']:.2f} ({speed['attention_share']:.0%}) | "
            f"{speed['tokens_per_second']:,.0f} |"
            for speed in result["speeds"]
        ]
    lines += [
        "",
        "| case | sigmoid | against | ratio | 95 % interval | of GPU time | Amdahl | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for each in result["ratios"]:
            against = each["softmax"] + " (best)" * each["is_best"]
            lines.append(
                f"| {result['case']} | {each['ours']} | {against} | {each['ratio']:.3f} | "
                f"{each['low']:.3f} – {each['high']:.3f} | {_or_dash(each['gpu_ratio'], '.3f')} | "
                f"{each['predicted']:.3f} | "
                f"{each['gap']:+.1%}{', to be explained' * each['needs_explanation']} |"
            )
    return "\n".join(lines) + "\n"


def _or_dash(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def over_processes(summaries: Sequence[dict[str, Any]]) -> str:
    """The ratios of several processes side by side.

    Args:
        summaries: Contents of `training_speed.json`, one a process.

    Returns:
        Markdown, a row for each case and pair that every process measured; the last two columns from the
        lowest to the highest process.
    """
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for summary in summaries:
        for result in summary["results"]:
            for each in result["ratios"]:
                found.setdefault((result["case"], each["ours"], each["softmax"]), []).append(each)
    columns = "fastest softmax in", "lowest ratio", "highest ratio", "of GPU time", "Amdahl"
    lines = [f"| case | sigmoid | against | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for names, measured in found.items():
        if len(measured) == len(summaries):
            ratios = [each["ratio"] for each in measured]
            best = f"{sum(each['is_best'] for each in measured)} of {len(measured)}"
            # The first published files have no `gpu_ratio`.
            ranges = (_range([each.get(name) for each in measured]) for name in ("gpu_ratio", "predicted"))
            cells = (*names, best, f"{min(ratios):.3f}", f"{max(ratios):.3f}", *ranges)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(numbers: Sequence[float | None]) -> str:
    known = [number for number in numbers if number is not None]
    return "–" if len(known) < len(numbers) else f"{min(known):.3f} – {max(known):.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ratios of several processes.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        Exit status: 0, 2 for input that cannot be used.
    """
    parser = experiment_parser("training_speed_report", __doc__)
    parser.add_argument("summaries", nargs="+", type=Path, help="training_speed.json of each process")
    options = parser.parse_args(arguments)
    try:
        print(over_processes([json.loads(path.read_text(encoding="utf-8")) for path in options.summaries]))
    except (OSError, ValueError, KeyError) as error:
        print(f"training_speed_report: expected summaries of training_speed: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
