r"""What the collective of a recorded step comes to, from 160M parameters to 70B and from one rank to 1,000.

Counts, for transformers of each size, the scalars of every kind of step; writes one step's records to find
their bytes on disk; and joins, on this machine's CPU, random numbers of as many ranks as there would be. The
time of the network is not measured but divided out: what all ranks send, over --gigabytes-per-second.

    python -m experiments.collective_scaling
    python -m experiments.collective_scaling --models 160M --ranks 2

Prints a table and writes `collective_scaling.json` below --out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.command_line import (
    experiment_parser,
    positive_float,
    positive_int,
    report_console,
    run_facts,
    write_json,
)
from probes.collective import slots_at_once
from probes.rank_reduction import RankReduction
from probes.record import Series, StepRecords, series_of
from probes.sinks import JsonLinesSink

DEFAULT_OUT = Path("runs/collective-scaling")
BYTES_PER_SLOT = 16  # a value and a weight in float64


class Shape(NamedTuple):
    """What of a decoder-only transformer decides how much is recorded.

    Attributes:
        blocks: Number of blocks.
        heads: Attention heads of each.
        layers_per_block: Layers with parameters of each.
        other_layers: Layers with parameters outside of blocks.
        embeddings: Of these, layers whose input has no gradient.
    """

    blocks: int
    heads: int
    layers_per_block: int
    other_layers: int
    embeddings: int


MODELS = {
    "160M": Shape(12, 16, 8, 4, 2),  # experiments.token_transformer
    "7B": Shape(32, 32, 9, 3, 1),  # a Llama: seven projections and two norms without biases
    "70B": Shape(80, 64, 9, 3, 1),
}
KINDS = ("every step", "every 10th", "every 200th")


def slots(shape: Shape) -> dict[str, int]:
    """Scalars that a rank sends at each kind of step, at the default periods.

    Args:
        shape: The model.

    Returns:
        Kind → number of slots, of which one is the loss.

    Example:
        >>> slots(Shape(2, 4, 8, 4, 2))
        {'every step': 43, 'every 10th': 151, 'every 200th': 349}
    """
    layers = shape.blocks * (shape.layers_per_block + 1) + shape.other_layers  # a block is a layer too
    owners = layers - shape.blocks
    every_step = 2 * owners + 3  # gradient, weight; loss, first gradient, whether there is more
    # Of each block its output, the gradient there, and both sides of the gain; of each attention layer and
    # each of its heads two maxima and four means with their standard errors.
    attention = shape.blocks * 10 * (1 + shape.heads)
    every_tenth = every_step + 4 * shape.blocks + attention
    # Of each owner the largest entry, the count, the change, Adam's and the size; of each layer five of its
    # output.
    every_200th = every_step + attention + 5 * owners + 5 * layers - 2 * shape.embeddings
    return dict(zip(KINDS, (every_step, every_tenth, every_200th), strict=True))


def milliseconds_to_join(num_slots: int, num_ranks: int) -> float:
    """Time of joining what so many ranks send, on this CPU, in the pieces that the probe takes.

    Args:
        num_slots: Of each rank.
        num_ranks: How many there are.
    """
    quantities = ("grad_norm", "grad_max_abs", "attention/entropy", "activation_rms")
    names = [series_of("layer", quantities[i % len(quantities)]) for i in range(num_slots)]
    reduction = RankReduction(names, [False] * num_slots, torch.device("cpu"))
    width = min(num_slots, slots_at_once(num_ranks))
    gathered = torch.rand(num_ranks, 2, width, dtype=torch.float64)
    reduction.over_ranks(gathered)  # allocators and threads are ready
    started = time.perf_counter()
    for first in range(0, num_slots, width):
        size = min(width, num_slots - first)
        reduction.over_ranks(gathered[:, :, :size], first)
    return 1e3 * (time.perf_counter() - started)


def bytes_per_record() -> float:
    """Bytes of a record in JSON lines: an attention statistic of a head, the longest there is."""
    names = tuple(
        Series(f"model.layers.{block}.self_attn", "attention/entropy", head, kind="estimate")
        for block in range(10)
        for head in range(32)
    )
    values = np.random.default_rng(0).random(len(names))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.jsonl"
        sink = JsonLinesSink(path)
        sink.write(StepRecords(100, names, values, values / 100))
        sink.close()
        return path.stat().st_size / len(names)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("collective_scaling", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default all")
    add("--ranks", nargs="+", type=positive_int, default=[8, 64, 1000], help="default 8 64 1000")
    add(
        "--gigabytes-per-second",
        type=positive_float,
        default=40.0,
        help="what a rank takes in from the network: default 40, a 400 Gbit/s port in practice",
    )
    add("--out", type=Path, default=DEFAULT_OUT, help=f"where to write (default {DEFAULT_OUT})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, simulate and report. Exit status 0."""
    from rich.table import Table

    options = parse_arguments(arguments)
    started = time.time()
    torch.set_num_threads(1)
    per_record = bytes_per_record()
    table = Table(
        title="One recorded step", caption="pieces: collectives, since 64 MiB are gathered at a time"
    )
    for heading in (
        "model",
        "ranks",
        "kind",
        "slots",
        "kB a rank",
        "MB of all",
        "pieces",
        "network ms",
        "CPU ms",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "kind") else "right")
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for num_ranks in options.ranks:
            for kind, num_slots in slots(MODELS[model]).items():
                sent = num_slots * BYTES_PER_SLOT
                row = {
                    "model": model,
                    "ranks": num_ranks,
                    "kind": kind,
                    "slots": num_slots,
                    "bytes_of_a_rank": sent,
                    "bytes_of_all": sent * num_ranks,
                    "pieces": -(-num_slots // slots_at_once(num_ranks)),
                    "network_ms": 1e3 * sent * num_ranks / (options.gigabytes_per_second * 1e9),
                    "join_ms": milliseconds_to_join(num_slots, num_ranks),
                }
                rows.append(row)
                table.add_row(
                    model,
                    f"{num_ranks:,}",
                    kind,
                    f"{num_slots:,}",
                    f"{sent / 1e3:,.1f}",
                    f"{sent * num_ranks / 1e6:,.1f}",
                    str(row["pieces"]),
                    f"{row['network_ms']:.3g}",
                    f"{row['join_ms']:.3g}",
                )
            table.add_section()
    console = report_console()
    console.print(table)
    console.print(f"A record of a head takes {per_record:.0f} bytes in JSON lines.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "collective_scaling.json"
    facts = {"schema_version": 1, **run_facts("collective_scaling", arguments, started)}
    write_json(path, {**facts, "bytes_per_record": per_record, "rows": rows})
    console.print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
