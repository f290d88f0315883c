"""The plan of the stress test at 160 million parameters and 8,192 tokens, written before its runs.

    python -m experiments.stress_plan              # every question, hypothesis, prediction, run and cost
    python -m experiments.stress_plan --gpus 1     # the cost on another machine

A question is asked of both mechanisms with the same seeds, and each run is at least 1,500 steps long.
Questions come in order of importance and in sessions: what one lease (`LEASE_MINUTES`) of a machine of four
GPUs takes, two runs at a time on each. Three seeds of the strongest regime that these find come after them,
as a question of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.cell_transformer import MECHANISMS
from experiments.command_line import experiment_parser, positive_int
from experiments.run_config import RunConfig

# Training time of a lease of thirty minutes: what its start, three calls' beginnings and their writing leave.
LEASE_MINUTES = 24.0
# What the sessions are made for.
NUM_GPUS, SIDE_BY_SIDE = 4, 2
# Measured on an H100 with the probes on: a step of one cell of 8,192 tokens takes the GPU some 0.055 s and
# the host 0.08 s, so two runs share one GPU well. A step of the lead takes it 0.22 s, and a second run would
# double that. Starting a run costs imports, cells and Triton's first calls.
GPU_SECONDS_PER_CELL = 0.055
HOST_SECONDS_PER_BLOCK = 0.08 / 12
START_SECONDS = 30.0


@dataclass(frozen=True)
class Question:
    """One thing to find out.

    Attributes:
        name: Of its runs, too.
        session: Lease in which it is asked.
        hypothesis: What is thought, and why.
        prediction: What will be seen if that is so.
        changes: Fields of `RunConfig` that differ from its defaults.
        seeds: One pair of runs, softmax and sigmoid, for each.
        takes_whole_gpu: Whether a run of it shares its GPU with no other where there are several GPUs.
        may_be_cut: Whether the runs begin even if the lease cannot see their end; they count as far as they
            get.
    """

    name: str
    session: int
    hypothesis: str
    prediction: str
    changes: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    takes_whole_gpu: bool = False
    may_be_cut: bool = False

    def runs(self) -> list[RunConfig]:
        """The question's runs, the two of one seed beside each other."""
        return [
            RunConfig(f"{self.name}-{mechanism}-seed{seed}", mechanism, seed=seed, **self.changes)
            for seed in self.seeds
            for mechanism in MECHANISMS
        ]


# The defaults of RunConfig are the regime of the best lead in SCIENCE.md, section 4, but for its batch:
# rank-encoded real cells, pre-LN, GPT-2 initialisation, rate 1e-3, 100 steps of warm-up, β₂ 0.999, weight
# decay 0.01, no clipping.
QUESTIONS: tuple[Question, ...] = (
    Question(
        "lead",
        1,
        "Softmax rows collapse layer by layer, their logits grow, and gradients grow with them; sigmoid "
        "has no rows that could collapse onto one key.",
        "Softmax: median gradient norm rises from step 1,000 on, spikes above 30 x the median of steps "
        "100-300, entropy below 0.1 nats in layer 1 first; no sustained factor of 1e4. Sigmoid: no spike "
        "above 10 x, validation loss lower by 0.1 nats and more.",
        {"batch_size": 4, "steps": 6000},
        takes_whole_gpu=True,
        may_be_cut=True,
    ),
    Question(
        "healthy-ranks",
        1,
        "Clipped at 1 and at a moderate rate both mechanisms learn the task, so that what goes wrong "
        "elsewhere is the regime's fault and not the harness's.",
        "Validation cross-entropy at least 0.3 nats below the unigram one, 6 of 6 runs. (Unigram 9.207; "
        "leaving out the genes that a cell shows and guessing by frequency would reach 7.94.)",
        {"learning_rate": 5e-4, "schedule": "cosine", "clip_norm": 1.0, "batch_size": 2, "steps": 2000},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-1e-3",
        1,
        "The lead's rate at a quarter of its batch: noisier gradients, the same collapse.",
        "No explosion; softmax's largest sustained factor is 2 to 10 times sigmoid's.",
        {"learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-3e-3",
        1,
        "Between the two lies softmax's largest stable rate, and not yet sigmoid's.",
        "Softmax fails to learn in at least 2 of 3 seeds, sigmoid learns in at least 2 of 3.",
        {"learning_rate": 3e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "no-warm-up-1e-3",
        2,
        "Without warm-up Adam's first full-size steps throw the weights far out for both alike; what follows "
        "depends on where they land.",
        "A first-steps transient of 2 to 4 orders in both, over within 10 steps; afterwards as rate-1e-3.",
        {"warmup_steps": 0, "learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "rate-1e-2",
        2,
        "Ten times the rate drives both out of health: softmax to one-hot rows, sigmoid to saturation.",
        "Neither learns (both within 0.05 nats of the unigram loss). Softmax's level after step 300 is 1 "
        "to 2 orders above sigmoid's; neither reaches a sustained 1e4.",
        {"learning_rate": 1e-2},
        seeds=(0, 1, 2),
    ),
    Question(
        "no-warm-up-1e-2",
        2,
        "As before, at the rate where sixteen short runs of regression came nearest to an explosion.",
        "Softmax's median gradient norm is 1 to 2 orders above sigmoid's; no healthy baseline in either, "
        "so no explosion by the definition.",
        {"warmup_steps": 0, "learning_rate": 1e-2},
        seeds=(0, 1, 2),
    ),
    Question(
        "healthy-values",
        2,
        "The same of masked-value regression.",
        "Explained variance above 0.2, 6 of 6 runs. (Each gene's mean alone explains 0.67.)",
        {"task": "values", "learning_rate": 3e-4, "clip_norm": 1.0},
        seeds=(0, 1, 2),
    ),
    Question(
        "bfloat16-weights",
        2,
        "Weights and moments in bfloat16 lose the small updates that keep logits in bounds.",
        "Both learn more slowly than rate-1e-3; softmax's max logit grows no faster. No explosion.",
        {"precision": "bfloat16"},
    ),
    Question(
        "init-0.1",
        2,
        "Five times GPT-2's standard deviation is 25 times the logits at the start: softmax begins "
        "collapsed, sigmoid begins saturated where its bias does not hold.",
        "Softmax's first-steps transient exceeds sigmoid's by an order; neither learns in 1,500 steps.",
        {"model": {"init_std": 0.1}},
    ),
    Question(
        "beta2-0.9999",
        2,
        "A long second moment lags behind growing gradients: larger relative updates at every spike.",
        "Softmax's spikes grow (largest factor above that of rate-1e-3, seed 0), sigmoid's do not.",
        {"betas": (0.9, 0.9999)},
    ),
    Question(
        "beta2-0.95",
        2,
        "A short second moment follows the gradients and so damps spikes (Wortsman et al. 2304.13013).",
        "Fewer factors above 10 than rate-1e-3, seed 0, in softmax; no change in sigmoid.",
        {"betas": (0.9, 0.95)},
    ),
    Question(
        "eps-1e-15",
        2,
        "With gradients of 0.2 over 160 million weights, ε = 1e-8 matters for the smallest entries alone.",
        "No difference from rate-1e-3, seed 0, in either mechanism.",
        {"eps": 1e-15},
    ),
    Question(
        "post-ln",
        2,
        "Post-LN gradients grow towards the output at the start (Xiong et al. 2002.04745): less room for a "
        "collapsed layer.",
        "Softmax stops learning (within 0.05 nats of unigram); sigmoid may as well. No sustained 1e4.",
        {"model": {"norm_position": "post"}},
    ),
    Question(
        "deep",
        2,
        "21 layers of 768 in place of 12 of 1,024: gains multiply over more layers.",
        "Softmax's largest factor is 3 times that of rate-1e-3, seed 0, or more; sigmoid's is not.",
        {"model": {"num_layers": 21, "embed_dim": 768, "num_heads": 12}},
    ),
    Question(
        "length-512",
        2,
        "Short rows collapse less: entropy starts at 6.2 nats in place of 9.0, and b = −ln n is smaller.",
        "Softmax and sigmoid differ less than in rate-1e-3, seed 0, in gradient factor and in loss.",
        {"tokens": 512, "batch_size": 16},
    ),
    Question(
        "heavy-tails",
        2,
        "Counts as targets: a few cells carry nearly all of the gradient, whatever the mechanism.",
        "Spikes of 2 orders above the median in both; explained variance lower than in healthy-values.",
        {"task": "counts"},
    ),
    # Added after the first 26 runs (docs/results/2026-11-22-stress-160m.md), before any run of these.
    Question(
        "values-1e-3",
        3,
        "Ranks are hardly learned in 1,500 steps, so a calm mechanism cannot show there that it learns as "
        "well. Values are learned, and softmax's rows collapse at the same rates.",
        "Both explain more than 0.5 of the variance in 3 of 3 seeds; softmax has single steps of 1 to 2 "
        "orders, sigmoid of less than 1; no explosion. The gradients of sigmoid's query projections fall "
        "below a hundredth of softmax's.",
        {"task": "values", "learning_rate": 1e-3},
        seeds=(0, 1, 2),
    ),
    Question(
        "values-3e-3",
        3,
        "The same at the rate of the strongest regime so far.",
        "Neither mechanism passes the genes' means (0.67 of the variance) in 2 of 3 seeds; softmax has "
        "single steps of 2 orders and more; no explosion. Sigmoid has row sums above 512 in 3 of 3.",
        {"task": "values", "learning_rate": 3e-3},
        seeds=(0, 1, 2),
    ),
)

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
