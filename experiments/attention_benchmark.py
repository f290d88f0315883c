"""Sigmoid attention against its peers and softmax attention: speed and error, interleaved in one process.

In each round every contender takes its turn, in an order that is drawn anew each time; a turn is as many
calls as fill --turn-ms, after half as many that are not counted and bring the chip to the clock of this load.
Reported is the median over rounds, in TFLOP/s counted on valid tokens only: an implementation that
computes padding pays for it. The error of the output against float64 stands beside each speed. Ceilings, a
matrix product and a copy, are measured in the same rounds.

    PYTHONPATH=. python -m experiments.attention_benchmark                    # one H100, about 15 minutes
    PYTHONPATH=. python -m experiments.attention_benchmark --preset quick     # two cases
    python -m experiments.attention_benchmark --device cpu --preset tiny      # that it runs

Writes `attention.json` after each case and `attention.png` below --out. Ctrl-C reports the cases that were
completed (exit status 130).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from experiments.attention_contenders import Case, Inputs, contenders, passes, relative_error
from experiments.attention_report import Measurement, attention_table, draw_figure
from experiments.command_line import (
    add_device,
    check_device,
    experiment_parser,
    fail,
    positive_float,
    positive_int,
    progress_bar,
    report_console,
    run_facts,
    write_json,
)
from stability.attention import explain

DEFAULT_OUT = Path("runs/attention")
TOKENS, WIDTH = 16_384, 2_048  # of all sequences together, and heads × head_dim
CEILING_SIZE = {"cuda": 8_192, "cpu": 256}


def _case(tokens: int, head_dim: int, **choice: object) -> Case:
    return Case(TOKENS // tokens, WIDTH // head_dim, tokens, head_dim, **choice)  # type: ignore[arg-type]


PRESETS: dict[str, list[Case]] = {
    "full": [
        *(_case(n, d, bias=b) for d in (128, 64) for n in (2048, 8192, 16384) for b in ("-ln n", "0")),
        *(_case(8192, d, is_causal=True) for d in (128, 64)),
        *(_case(n, d, padding=p) for d in (128, 64) for n in (1024, 8192) for p in (0.25, 0.5)),
    ],
    "quick": [_case(8192, 128), _case(8192, 64)],
    "tiny": [Case(2, 2, 64, 16), Case(2, 2, 64, 16, padding=0.25, is_causal=True, bias="0")],
}


def time_turn(function: Callable[[], object], calls: int, device: str) -> float:
    """One turn, after half as many calls that are not counted.

    Args:
        function: What is timed.
        calls: How often it is called while the time is taken.
        device: "cuda" is timed by events on the stream.

    Returns:
        Milliseconds a call.
    """
    for _ in range(calls // 2):
        function()
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - started) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(
    functions: dict[str, Callable[[], object]], *, rounds: int, turn_ms: float, device: str
) -> dict[str, float]:
    """Median milliseconds a call of several functions that take turns.

    Args:
        functions: Name → what is timed.
        rounds: How often each has its turn.
        turn_ms: Length of a turn.
        device: "cpu" or "cuda".

    Returns:
        Name → milliseconds.
    """
    calls = {}
    for name, function in functions.items():
        function()  # compiles, tunes, allocates
        calls[name] = max(1, round(turn_ms / max(time_turn(function, 2, device), 1e-3)))
    times = time_rounds(functions, calls, rounds=rounds, device=device)
    return {name: float(np.median(values)) for name, values in times.items()}


def time_rounds(
    functions: Mapping[str, Callable[[], object]], calls: Mapping[str, int], *, rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds a call of several functions that take turns, round by round.

    Args:
        functions: Name → what is timed.
        calls: Name → calls of a turn.
        rounds: How often each has its turn.
        device: "cpu" or "cuda".
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(names)  # a fixed order would give each the clock that the one before it left behind
        for name in names:
            times[name].append(time_turn(functions[name], calls[name], device))
    return times


def ceiling_functions(device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A square matrix product and a copy of one of its factors."""
    size = CEILING_SIZE[device]
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return {"matrix product": lambda: torch.mm(left, right, out=out), "copy": lambda: out.copy_(left)}


def measure_case(
    case: Case, device: str, dtype: torch.dtype, *, rounds: int, turn_ms: float
) -> tuple[list[Measurement], dict[str, float], dict[str, str]]:
    """All contenders of a case.

    Args:
        case: What is computed.
        device: "cpu" or "cuda".
        dtype: Of the inputs.
        rounds: How often each has its turn.
        turn_ms: Length of a turn.

    Returns:
        Measurements; TFLOP/s of the matrix product and TB/s of the copy; contender → why it failed.
    """
    inputs = Inputs.random(case, device, dtype)
    functions = ceiling_functions(device, dtype)
    found, errors, failed = [], {}, {}
    for contender in contenders(case, device):
        try:
            errors[contender.name] = relative_error(contender, case, inputs)
            own = passes(contender, inputs)
            for function in own.values():
                function()
        except Exception as error:  # a peer that cannot compute this case
            if contender.kind == "ours":
                raise
            failed[contender.name] = repr(error)[:500]
            continue
        found.append(contender)
        functions |= {f"{contender.name}|{which}": function for which, function in own.items()}
    times = measure(functions, rounds=rounds, turn_ms=turn_ms, device=device)
    measurements = [
        Measurement(
            str(case),
            contender.name,
            contender.kind,
            which,
            times[key],
            case.flop(which) / times[key] / 1e9,
            errors[contender.name],
        )
        for contender in found
        for key in functions
        if (which := key.partition("|")[2]) and key.partition("|")[0] == contender.name
    ]
    size = CEILING_SIZE[device]
    ceilings = {
        "matrix product, TFLOP/s": 2 * size**3 / times["matrix product"] / 1e9,
        "copy, TB/s": 2 * size**2 * dtype.itemsize / times["copy"] / 1e9,
    }
    return measurements, ceilings, failed


def parse_turns(
    program: str,
    description: str | None,
    presets: Mapping[str, Sequence[Case]],
    out: Path,
    arguments: Sequence[str] | None,
) -> argparse.Namespace:
    """Flags of a benchmark in which calls take turns; argparse exits with status 2 on a bad one.

    Args:
        program: Its module's name.
        description: What --help says.
        presets: Name → cases; "full" is the default.
        out: Where it writes by default.
        arguments: The command line, or None for that of the process.
    """
    parser = experiment_parser(program, description)
    add = parser.add_argument
    add("--preset", choices=presets, default="full", help="which cases (default full)")
    add_device(parser, "cuda", "cpu is for tests (default cuda)")
    add("--rounds", type=positive_int, default=15, help="turns of each call (default 15)")
    add("--turn-ms", type=positive_float, default=20.0, help="length of a turn in ms (default 20)")
    add("--out", type=Path, default=out, help=f"where to write (default {out})")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit status: 0, 130 after Ctrl-C, 2 if nothing can be written to --out."""
    options = parse_turns("attention_benchmark", __doc__, PRESETS, DEFAULT_OUT, arguments)
    console = report_console()
    json_path, figure_path = options.out / "attention.json", options.out / "attention.png"
    started = time.time()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    measurements: list[Measurement] = []
    ceilings: dict[str, dict[str, float]] = {}
    failed: dict[str, dict[str, str]] = {}
    explanations: dict[str, str] = {}
    cases = PRESETS[options.preset]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=str(case))
                found, ceilings[str(case)], failed[str(case)] = measure_case(
                    case, options.device, dtype, rounds=options.rounds, turn_ms=options.turn_ms
                )
                inputs = Inputs.random(case, options.device, dtype)
                lengths = case.lengths
                explanations[str(case)] = str(
                    explain(
                        inputs.query, inputs.key, inputs.value,
                        is_causal=case.is_causal, key_lengths=lengths, query_lengths=lengths,
                    )
                )  # fmt: skip
                measurements += found
                # After each case: a machine that is taken away leaves what was measured.
                write_json(
                    json_path,
                    {
                        "schema_version": 1,
                        **run_facts("attention_benchmark", arguments, started, options.device),
                        "rounds": options.rounds,
                        "measurements": [asdict(measurement) for measurement in measurements],
                        "ceilings": ceilings,
                        "failed": failed,
                        "explanations": explanations,
                    },
                )
                progress.advance(task)
    except OSError as error:
        return fail("attention_benchmark", error)
    except KeyboardInterrupt:
        pass
    num_cases = len(explanations)
    if not num_cases:
        console.print("Interrupted before the first case was complete; nothing is measured.")
        return 130

    product = float(np.median([values["matrix product, TFLOP/s"] for values in ceilings.values()]))
    copy = float(np.median([values["copy, TB/s"] for values in ceilings.values()]))
    title = f"Attention, {dtype}, {options.device}"
    note = f"{options.rounds} rounds. Ceilings: matrix product {product:.3g} TFLOP/s, copy {copy:.3g} TB/s."
    missing = sorted({name for names in failed.values() for name in names})
    if missing:
        note += f" Failed somewhere: {', '.join(missing)}."
    draw_figure(figure_path, measurements, {"matrix product": product}, title)
    console.print(attention_table(measurements, title, note))
    console.print(f"Written: {json_path}, {figure_path}")
    if num_cases < len(cases):
        console.print(f"Interrupted: {num_cases} of {len(cases)} cases measured.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
