"""Stress test: softmax and sigmoid attention up a ladder of learning rates, without gradient clipping.

Trains the same cell transformer (same initial weights, same batches) with both mechanisms at every learning
rate and seed: masked-value regression, AdamW, constant rate from the first step. Probes record every layer.

    python -m experiments.stress_test                                  # 1.1M parameters, 512 tokens, real
                                                                       # cells; some 3 minutes on a CPU
    python -m experiments.stress_test --data cells.h5ad --steps 200    # your own cells
    python -m experiments.stress_test --preset tiny                    # does everything run? seconds
    PYTHONPATH=. python -m experiments.stress_test --preset 160m --device cuda --steps 20   # one H100
    PYTHONPATH=. python -m experiments.stress_test --preset 160m --device cuda --resume runs/long
                                                                       # the published plan, piece by piece

Writes below --log-dir: TensorBoard events, one directory per run side by side, `summary.json` and
`gradient_norms.png`. Ctrl-C ends the run under way and reports what was recorded (exit status 130).
What counts as an explosion is defined in `experiments/explosion.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments import stress_queue
from experiments.cell_transformer import MECHANISMS, CellTransformer, CellTransformerConfig
from experiments.cells import Cells, pbmc68k, read_cells, synthetic_cells
from experiments.command_line import (
    add_device,
    add_threads,
    check_device,
    experiment_parser,
    fail,
    positive_float,
    positive_int,
    progress_bar,
    report_console,
    run_facts,
)
from experiments.explosion import Run, judge
from experiments.stress_report import conclusion, draw_figure, summary_table, write_json
from experiments.stress_run import TrainingSettings, train

DEFAULT_LOG_DIR = Path("runs/stress")

# Post-LN, as in BERT, learns within tens of steps at laptop size, so that gentle rates show a healthy
# gradient to compare with; pre-LN is what large models use. The laptop ladder goes up in tens to 1 and ends
# at 3, where this small a model passes the explosion threshold: its gradients grow with width.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "data": "synthetic",
        "tokens": 64,
        "steps": 20,
        "batch_size": 8,
        "learning_rates": [1e-2, 1.0],
        "seeds": [0],
        "norm_position": "post",
    },
    "laptop": {
        "data": "pbmc68k",
        "tokens": 512,
        "steps": 45,
        "batch_size": 1,
        "learning_rates": [1e-3, 1e-2, 1e-1, 1.0, 3.0],
        "seeds": [0, 1],
        "norm_position": "post",
    },
    "160m": {
        "data": "synthetic",
        "tokens": 8192,
        "steps": 100,
        "batch_size": 1,
        "learning_rates": [1e-3, 1e-2, 1e-1],
        "seeds": [0],
        "norm_position": "pre",
    },
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags, with the preset's values where none is given; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("stress_test", __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="laptop", help="model size and defaults of the flags below")
    add_device(parser, help_text="cuda trains under bfloat16 autocast")
    add("--data", help="pbmc68k (needs scanpy), synthetic, or an .h5ad file with counts or logged counts")
    add("--mechanisms", nargs="+", choices=MECHANISMS, default=list(MECHANISMS), help="what to compare")
    add("--learning-rates", nargs="+", type=positive_float, help="the ladder, reported rung by rung")
    add("--seeds", nargs="+", type=int, help="each decides initial weights and batches, alike for both")
    add("--steps", type=positive_int, help="optimizer steps of a run")
    add("--tokens", type=positive_int, help="longest sequence; longer cells are sampled")
    add("--batch-size", type=positive_int, help="cells per step")
    add("--mask-fraction", type=_fraction, default=0.25, help="share of values hidden (default 0.25)")
    add("--expressed-only", action="store_true", help="do not fill short cells up with unexpressed genes")
    add("--norm-position", choices=["pre", "post"], help="layer norm before or after each sublayer")
    add("--warmup-steps", type=int, default=0, help="linear learning-rate warm-up (default none)")
    add_threads(
        parser, "CPU threads (default 1: at laptop size a second gains little, and stalls on a busy machine)"
    )
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue, for nine minutes, the long runs of experiments/stress_plan.py in this folder, or "
        "begin them there; of the other flags --preset, --device and --threads apply. What else there is to "
        "choose: python -m experiments.stress_queue --help",
    )
    add("--log-dir", type=Path, default=DEFAULT_LOG_DIR, help=f"where to write (default {DEFAULT_LOG_DIR})")
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("mechanisms", "learning_rates", "seeds"):  # a repeated one would overwrite its own run
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    check_device(parser, options.device)
    return options


def load_cells(source: str, *, tokens: int) -> Cells:
    """The cells named on the command line.

    Args:
        source: "pbmc68k", "synthetic" or a path.
        tokens: Synthetic cells get a fifth more genes than that, of which they express nine in ten.

    Returns:
        The cells.
    """
    if source == "pbmc68k":
        return pbmc68k()
    if source == "synthetic":
        num_genes = tokens * 6 // 5
        return synthetic_cells(num_genes=num_genes, counts_per_cell=40 * num_genes)
    return read_cells(source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stress test. Exit status: 0, 130 after Ctrl-C, 2 for input that cannot be used."""
    options = parse_arguments(arguments)
    if options.resume is not None:
        shared = {"preset": options.preset, "device": options.device, "threads": options.threads}
        flags = [text for name, value in shared.items() for text in (f"--{name}", str(value))]
        return stress_queue.main([*flags, "--work", str(options.resume), "--out", str(options.resume)])
    console = report_console()
    torch.set_num_threads(options.threads)
    try:
        cells = load_cells(options.data, tokens=options.tokens)
        options.log_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        return fail("stress_test", error)

    # One model of each mechanism at a time; they differ in nothing but the attention function.
    configs = {
        mechanism: CellTransformerConfig.preset(
            options.preset,
            num_genes=len(cells.genes),
            attention=mechanism,
            norm_position=options.norm_position,
        )
        for mechanism in options.mechanisms
    }
    with torch.device("meta"):
        parameter_counts = CellTransformer(configs[options.mechanisms[0]]).parameter_counts()
    settings = TrainingSettings(
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        batch_size=options.batch_size,
        max_tokens=options.tokens,
        mask_fraction=options.mask_fraction,
        include_zeros=not options.expressed_only,
        device=options.device,
    )
    # Gentlest first: an interrupted test has its baselines, and mechanisms stay in step.
    plan = [
        (rate, seed, mechanism)
        for rate in sorted(options.learning_rates)
        for seed in options.seeds
        for mechanism in options.mechanisms
    ]
    console.print(
        f"{len(cells)} cells, {len(cells.genes)} genes: {cells.source}. Parameters: "
        + ", ".join(f"{part} {count:,}" for part, count in parameter_counts.items())
        + f". {len(plan)} runs of {options.steps} steps; probes record to {options.log_dir}.",
        highlight=False,
    )

    runs: list[Run] = []
    started = time.time()
    is_interrupted = False
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(plan) * options.steps)
            for number, (rate, seed, mechanism) in enumerate(plan):
                name = f"{mechanism}, rate {rate:g}, seed {seed}"
                progress.update(task, description=name, completed=number * options.steps)

                def show(loss: float, name: str = name) -> None:
                    progress.update(task, advance=1, description=f"{name}, loss {loss:.3g}")

                run = train(
                    cells,
                    configs[mechanism],
                    settings,
                    learning_rate=rate,
                    seed=seed,
                    log_dir=options.log_dir / f"{mechanism}-lr{rate:g}-seed{seed}",
                    on_step=show,
                )
                runs.append(run)
                if is_interrupted := run.is_interrupted:
                    break
    except KeyboardInterrupt:  # between two runs
        is_interrupted = True
    if not runs:
        console.print("Interrupted before the first run; nothing is recorded.")
        return 130

    judgements = judge(runs)
    facts = {
        **run_facts("stress_test", arguments, started, options.device),
        "is_interrupted": is_interrupted,
        "cells": {"source": cells.source, "cells": len(cells), "genes": len(cells.genes)},
        "config": {
            "preset": options.preset,
            "model": {**asdict(configs[options.mechanisms[0]]), "attention": options.mechanisms},
            "training": asdict(settings),
            "learning_rates": options.learning_rates,
            "seeds": options.seeds,
        },
        "parameters": parameter_counts,
    }
    json_path, figure_path = options.log_dir / "summary.json", options.log_dir / "gradient_norms.png"
    write_json(json_path, runs, judgements, facts)
    draw_figure(figure_path, runs, judgements)
    console.print(summary_table(runs, judgements))
    console.print(conclusion(runs, judgements), highlight=False)
    console.print(f"Written: {json_path}, {figure_path}. Per layer: tensorboard --logdir {options.log_dir}")
    if is_interrupted:
        console.print(f"Interrupted: {len(runs)} of {len(plan)} runs recorded, the last perhaps in part.")
    return 130 if is_interrupted else 0


def _fraction(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1]; got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
