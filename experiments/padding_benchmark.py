"""What masks cost sigmoid attention: time over the share of pairs that count × the dense time.

A kernel that skips what is padded would reach 1. Per batch size and head dimension the dense call, one with
lengths that pad nothing, two with lengths drawn uniformly from 1 to n, and a causal one take turns in one
process, as in `attention_benchmark`.

    PYTHONPATH=. python -m experiments.padding_benchmark                      # one H100, about a minute
    python -m experiments.padding_benchmark --device cpu --preset tiny        # that it runs

Writes `padding.json` below --out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.attention_benchmark import WIDTH, measure, parse_turns
from experiments.attention_contenders import PASSES, Case, Contender, Inputs, passes
from experiments.command_line import fail, report_console, run_facts, write_json
from stability import sigmoid_attention

DEFAULT_OUT = Path("runs/padding")
DENSE = "dense"
TIMED = PASSES[:2]
PRESETS = {
    "full": [Case(batch, WIDTH // head_dim, 8192, head_dim) for head_dim in (128, 64) for batch in (2, 16)],
    "tiny": [Case(2, 2, 64, 16)],
}


@dataclass(frozen=True)
class Cost:
    """One call of one case.

    Attributes:
        case: Batch, tokens and head dimension.
        call: What is masked.
        which: "forward" or "backward".
        share: Pairs of a query and a key that count, of all.
        milliseconds: Median over the rounds.
        ratio: Time over the share × the time of the dense call.
    """

    case: str
    call: str
    which: str
    share: float
    milliseconds: float
    ratio: float


def masked_calls(case: Case) -> dict[str, tuple[list[int] | None, bool, float]]:
    """Name → lengths, whether it is causal, and the share of pairs that count.

    Args:
        case: Its batch and tokens.
    """
    whole = [case.tokens] * case.batch
    calls: dict[str, tuple[list[int] | None, bool, float]] = {
        DENSE: (None, False, 1.0),
        "lengths, nothing padded": (whole, False, 1.0),
    }
    generator = torch.Generator().manual_seed(case.batch)
    for name in ("drawn lengths", "drawn lengths, again"):
        lengths = torch.randint(1, case.tokens + 1, (case.batch,), generator=generator).tolist()
        share = sum(length**2 for length in lengths) / (case.batch * case.tokens**2)
        calls[name] = lengths, False, share
    return calls | {"causal": (None, True, 0.5)}


def measure_case(case: Case, device: str, dtype: torch.dtype, *, rounds: int, turn_ms: float) -> list[Cost]:
    """All calls of a case, forward and backward.

    Args:
        case: What is computed.
        device: "cpu" or "cuda".
        dtype: Of the inputs.
        rounds: How often each has its turn.
        turn_ms: Length of a turn.
    """
    inputs = Inputs.random(case, device, dtype)
    calls = masked_calls(case)
    functions: dict[str, Callable[[], object]] = {}
    for name, (lengths, is_causal, _) in calls.items():
        on_device = None if lengths is None else torch.tensor(lengths, device=device)
        attend = partial(
            sigmoid_attention, is_causal=is_causal, key_lengths=on_device, query_lengths=on_device
        )
        own = passes(Contender(name, "ours", attend), inputs)
        functions |= {f"{name}|{which}": own[which] for which in TIMED}
    times = measure(functions, rounds=rounds, turn_ms=turn_ms, device=device)
    where = f"batch {case.batch}, n {case.tokens}, head dim {case.head_dim}"
    return [
        Cost(
            where,
            name,
            which,
            share,
            times[f"{name}|{which}"],
            times[f"{name}|{which}"] / (share * times[f"{DENSE}|{which}"]),
        )
        for name, (_, _, share) in calls.items()
        for which in TIMED
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit status: 0, or 2 if nothing can be written to --out."""
    from rich.table import Table

    options = parse_turns("padding_benchmark", __doc__, PRESETS, DEFAULT_OUT, arguments)
    console = report_console()
    started = time.time()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    costs: list[Cost] = []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for case in PRESETS[options.preset]:
            costs += measure_case(case, options.device, dtype, rounds=options.rounds, turn_ms=options.turn_ms)
            content = {
                "schema_version": 1,
                **run_facts("padding_benchmark", arguments, started, options.device),
                "rounds": options.rounds,
                "costs": [asdict(cost) for cost in costs],
            }
            write_json(options.out / "padding.json", content)
    except OSError as error:
        return fail("padding_benchmark", error)
    table = Table(title=f"Time over share of pairs × dense time, {dtype}, {options.device}")
    for heading in ("case", "call", "share", *(f"{which}, ms" for which in TIMED), *TIMED):
        table.add_column(heading, justify="left" if heading in ("case", "call") else "right")
    for forward, backward in zip(costs[::2], costs[1::2], strict=True):
        both = (forward, backward)
        table.add_row(
            forward.case,
            forward.call,
            f"{forward.share:.3f}",
            *(f"{cost.milliseconds:.3f}" for cost in both),
            *(f"{cost.ratio:.3f}" for cost in both),
        )
    console.print(table)
    console.print(f"Written: {options.out / 'padding.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
