"""How fast training is: sigmoid attention against softmax through each backend of SDPA, at 160M parameters.

In each round every contender trains for a turn, in an order drawn anew: half a turn that is not counted, then
the turn. All share weights and optimizer, in one process. Told are median times, the ratio to each softmax
contender round by round with a 95 % bootstrap interval, the ratio of what the GPU computes, which is what a
host that keeps up would give, and what Amdahl's law predicts of it from attention alone.

    PYTHONPATH=. python -m experiments.training_speed --device cuda --out results    # one H100, five minutes
    PYTHONPATH=. python -m experiments.training_speed --device cuda --cases "eager*8192*" --rounds 15
    python -m experiments.training_speed --preset tiny --out runs/speed               # that it runs

Writes `training_speed.json` after each case and `training_speed.md` below --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.attention_benchmark import measure, time_rounds
from experiments.attention_contenders import Case, Contender, Inputs, passes
from experiments.command_line import (
    add_device,
    check_device,
    experiment_parser,
    fail,
    positive_int,
    run_facts,
    write_json,
)
from experiments.gpu_time import gpu_times
from experiments.training_speed_contenders import (
    Mode,
    SharedTraining,
    contenders_compile,
    speed_contenders,
)
from experiments.training_speed_report import Speed, markdown, ratios

DEFAULT_OUT = Path("runs/training-speed")
BACKEND = "inductor"
_GENERAL = ("void at::native", "Memcpy", "Memset")  # kernels and copies of every part of a step


@dataclass(frozen=True)
class Preset:
    """A model and its cases.

    Attributes:
        num_layers: Blocks of the model.
        cases: Modes and shapes, what matters most first: a cut costs the last.
    """

    num_layers: int
    cases: tuple[tuple[Mode, Case], ...]


_LONG, _SHORT = Case(2, 16, 8192, 64), Case(8, 16, 2048, 64)
_LONG_PADDED, _SHORT_PADDED = replace(_LONG, padding=0.5), replace(_SHORT, padding=0.5)
_LONG_PACKED, _SHORT_PACKED = (replace(case, is_packed=True) for case in (_LONG_PADDED, _SHORT_PADDED))
PRESETS = {
    "160m": Preset(
        12,
        tuple(
            (mode, case)
            for mode in ("eager", "compiled")
            for case in (_LONG, _LONG_PADDED, _LONG_PACKED, _SHORT, _SHORT_PADDED, _SHORT_PACKED)
        ),
    ),
    "tiny": Preset(
        2,
        (
            ("eager", Case(2, 2, 32, 8)),
            ("eager", Case(2, 2, 32, 8, padding=0.5)),
            ("eager", Case(2, 2, 32, 8, padding=0.5, is_packed=True)),
        ),
    ),
}


def case_name(mode: Mode, case: Case) -> str:
    """What `--cases` matches, and tables say.

    Example:
        >>> case_name("eager", Case(2, 16, 8192, 64, padding=0.5))
        'eager, n 8192, 50% padding'
    """
    padding = f", {case.padding:.0%} padding" * bool(case.padding) + ", packed" * case.is_packed
    return f"{mode}, n {case.tokens}{padding}"


@contenders_compile()
def measure_case(
    mode: Mode, case: Case, num_layers: int, device: str, *, rounds: int, steps: int
) -> tuple[list[Speed], dict[str, str]]:
    """All contenders of a case.

    Args:
        mode: "eager" or "compiled".
        case: Shapes.
        num_layers: Blocks of the model.
        device: "cpu" or "cuda".
        rounds: How often each has its turn.
        steps: Of a turn.

    Returns:
        Speeds; contender → why it could not train this case.
    """
    torch._dynamo.reset()
    training = SharedTraining(case, num_layers, device)
    inputs = Inputs.random(case, device, torch.bfloat16 if device == "cuda" else torch.float32)
    found: list[Contender] = []
    failed: dict[str, str] = {}
    functions: dict[str, Callable[[], None]] = {}
    attention: dict[str, Callable[[], object]] = {}
    for contender in speed_contenders(case, device):
        try:
            step = training.step_of(contender, mode, BACKEND)
            step()  # compiles, tunes, allocates
            own = passes(contender, inputs)["forward+backward"]
            own()
        except Exception as error:  # a backend that cannot compute this case; of ours, see the exit status
            failed[contender.name] = repr(error)[:500]
            training.optimizer.zero_grad()
            continue
        found.append(contender)
        functions[contender.name], attention[contender.name] = step, own
    turns = time_rounds(functions, dict.fromkeys(functions, steps), rounds=rounds, device=device)
    if device == "cuda":
        times = {name: times_on_gpu(functions[name], attention[name], num_layers) for name in functions}
    else:
        both_passes = measure(attention, rounds=3, turn_ms=20.0, device=device)
        times = {name: AttentionTimes(num_layers * each) for name, each in both_passes.items()}
    tokens = sum(case.valid_lengths)
    speeds = []
    for contender in found:
        median = float(np.median(turns[contender.name]))
        attending = times[contender.name]
        speeds.append(
            Speed(
                contender.name, contender.kind, median, 1e3 * tokens / median,
                attending.alone, attending.alone / median, attending.step, attending.in_step,
                turns[contender.name],
            )
        )  # fmt: skip
    return speeds, failed


@dataclass(frozen=True)
class AttentionTimes:
    """Milliseconds of attention; on a GPU what it computes, without the time in which it waits for its host.

    Attributes:
        alone: Attention of all layers by itself, forward and backward.
        step: What a GPU computes of a whole training step. None on the CPU.
        in_step: Of this, attention's own kernels: those that attention alone launches, PyTorch's general
            ones left out, since the rest of the step has them too. None on the CPU.
    """

    alone: float
    step: float | None = None
    in_step: float | None = None


def times_on_gpu(
    step: Callable[[], object], attention: Callable[[], object], num_layers: int
) -> AttentionTimes:
    """Profiles a step, and attention by itself.

    Args:
        step: Of the training.
        attention: Both passes of one layer's attention.
        num_layers: Of the model.
    """
    of_step, of_attention = gpu_times(step, calls=2)[0], gpu_times(attention, calls=10)[0]
    own = (name for name in of_attention if not name.startswith(_GENERAL))
    in_step = sum(of_step[name] for name in own)
    return AttentionTimes(num_layers * of_attention.total(), of_step.total(), in_step)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with the chosen cases as `chosen`; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("training_speed", __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="160m", help="tiny is for tests (default 160m)")
    add_device(parser)
    add("--cases", nargs="+", metavar="PATTERN", default=["*"], help='such as "eager*" (default all)')
    add("--rounds", type=positive_int, default=7, help="turns of each contender (default 7)")
    add("--steps", type=positive_int, default=2, help="training steps of a turn (default 2)")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"where to write (default {DEFAULT_OUT})")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    cases = PRESETS[options.preset].cases
    options.chosen = [
        (mode, case)
        for mode, case in cases
        if any(fnmatch(case_name(mode, case), pattern) for pattern in options.cases)
    ]
    if not options.chosen:
        names = "; ".join(case_name(mode, case) for mode, case in cases)
        parser.error(f"no case matches {' '.join(options.cases)}; there are: {names}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report.

    Exit status: 0, 1 if sigmoid failed in a case, 2 if nothing can be written to --out.
    """
    options = parse_arguments(arguments)
    started = time.time()
    results: list[dict[str, Any]] = []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for mode, case in options.chosen:
            speeds, failed = measure_case(
                mode, case, PRESETS[options.preset].num_layers, options.device,
                rounds=options.rounds, steps=options.steps,
            )  # fmt: skip
            results.append(
                {
                    "case": case_name(mode, case),
                    "lengths": case.valid_lengths,
                    "speeds": [asdict(speed) for speed in speeds],
                    "ratios": [asdict(ratio) for ratio in ratios(speeds)],
                    "failed": failed,
                }
            )
            print(f"{time.time() - started:.0f} s: {case_name(mode, case)}", flush=True)
            # After each case: a machine that is taken away leaves what was measured.
            write_json(
                options.out / "training_speed.json",
                {
                    "schema_version": 1,
                    **run_facts("training_speed", arguments, started, options.device),
                    "rounds": options.rounds,
                    "steps": options.steps,
                    "results": results,
                },
            )
            (options.out / "training_speed.md").write_text(markdown(results), encoding="utf-8")
    except OSError as error:
        return fail("training_speed", error)
    print(markdown(results))
    for result in results:
        for name, reason in result["failed"].items():
            print(f"Failed: {result['case']}, {name}: {reason}")
    return int(any(name.startswith("sigmoid") for result in results for name in result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
