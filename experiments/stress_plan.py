"""The plan of the stress test at 160 million parameters and 8,192 tokens: its runs, sessions and cost.

    python -m experiments.stress_plan              # every question, hypothesis, prediction, run and cost
    python -m experiments.stress_plan --gpus 1     # the cost on another machine

The questions (`experiments/stress_questions.py`) come in sessions: what one lease (`LEASE_MINUTES`) of a
machine of four GPUs takes, two runs at a time on each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.command_line import experiment_parser, positive_int
from experiments.run_config import RunConfig
from experiments.stress_questions import QUESTIONS, Question

# Training time of a lease of thirty minutes: what its start, three calls' beginnings and their writing leave.
LEASE_MINUTES = 24.0
# What the sessions are made for.
NUM_GPUS, SIDE_BY_SIDE = 4, 2
# Measured with the probes on: a step of one cell of 8,192 tokens takes an H100 some 0.055 s and the host
# 0.08 s, so two runs share one GPU well. A step of four cells takes an H200 0.18 s, and a second run would
# double that. Starting a run costs imports, cells and Triton's first calls.
GPU_SECONDS_PER_CELL = 0.055
HOST_SECONDS_PER_BLOCK = 0.08 / 12
START_SECONDS = 30.0

# Sizes to try the harness with; 160m runs the plan as it stands.
SCALES: dict[str, dict[str, Any]] = {
    "160m": {},
    "laptop": {"tokens": 512, "batch_size": 2, "steps": 400, "warmup_steps": 20},
    "tiny": {"tokens": 64, "batch_size": 2, "steps": 12, "warmup_steps": 2},
}


def planned_runs(preset: str = "160m") -> dict[str, tuple[Question, RunConfig]]:
    """Every run by name, in the order of the plan.

    Args:
        preset: "160m", or a size that a CPU can train: on synthetic cells, in float32, without the plan's
            sizes.

    Returns:
        Question and configuration of each run.
    """
    runs = {}
    for question in sorted(QUESTIONS, key=lambda question: question.session):
        for config in question.runs():
            if preset != "160m":
                name = f"{preset}-{config.name}"  # so that files tell of which size they are
                model = {k: v for k, v in config.model.items() if k in ("norm_position", "init_std")}
                changes = {
                    "name": name,
                    "preset": preset,
                    "data": "synthetic",
                    "model": model,
                    **SCALES[preset],
                }
                if config.precision == "autocast":  # slower than float32 on most CPUs
                    changes["precision"] = "float32"
                config = replace(config, **changes)
            runs[config.name] = (question, config)
    return runs


def estimated_seconds(config: RunConfig, side_by_side: int = SIDE_BY_SIDE) -> float:
    """Time that a run trains while it shares its GPU with others like it.

    Args:
        config: A run at 160 million parameters.
        side_by_side: How many runs the GPU has.

    Returns:
        Seconds.
    """
    num_layers = config.model.get("num_layers", 12)
    gpu = side_by_side * GPU_SECONDS_PER_CELL * config.batch_size * config.tokens / 8192
    return config.steps * max(gpu, HOST_SECONDS_PER_BLOCK * num_layers)


def expected_minutes(questions: Sequence[Question], num_gpus: int) -> float:
    """Time that some questions take, each run beginning where a place is free first.

    Args:
        questions: In the order of their runs.
        num_gpus: At least 1, each with `SIDE_BY_SIDE` places.

    Returns:
        Minutes from the first beginning to the last end.
    """
    free_at = [[0.0] * SIDE_BY_SIDE for _ in range(num_gpus)]
    for question in questions:
        is_alone = question.takes_whole_gpu and num_gpus > 1
        for config in question.runs():
            seconds = START_SECONDS + estimated_seconds(config, 1 if is_alone else SIDE_BY_SIDE)
            if is_alone:
                gpu = min(free_at, key=max)
                gpu[:] = [max(gpu) + seconds] * SIDE_BY_SIDE
            else:
                gpu = min(free_at, key=min)
                gpu[gpu.index(min(gpu))] += seconds
    return max(map(max, free_at)) / 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan. Exit status 0."""
    parser = experiment_parser("stress_plan", __doc__)
    parser.add_argument(
        "--gpus", type=positive_int, default=NUM_GPUS, help=f"of the machine (default {NUM_GPUS})"
    )
    num_gpus = parser.parse_args(arguments).gpus
    sessions = sorted({question.session for question in QUESTIONS})
    all_runs = [config for question in QUESTIONS for config in question.runs()]
    print(f"{len(all_runs)} runs, {sum(run.steps for run in all_runs):,} steps, {len(sessions)} sessions.")
    for session in sessions:
        questions = [question for question in QUESTIONS if question.session == session]
        minutes = expected_minutes(questions, num_gpus)
        num_runs = sum(len(question.runs()) for question in questions)
        print(
            f"\nSession {session}: {num_runs} runs, {minutes:.0f} minutes expected on {num_gpus} GPUs; "
            f"a lease has {LEASE_MINUTES:g} for training"
        )
        for question in questions:
            changes = ", ".join(f"{name} {value}" for name, value in question.changes.items())
            cut = "; as far as the lease goes" if question.may_be_cut else ""
            print(f"\n  {question.name}: softmax and sigmoid, seeds {question.seeds}{cut}")
            print(f"    changes     {changes}")
            print(f"    hypothesis  {question.hypothesis}")
            print(f"    prediction  {question.prediction}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
