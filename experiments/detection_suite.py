"""Which runs the fault suite consists of: one half to tune detectors on, one half to score them.

The halves share no seed, no model and no strength of a fault; two kinds of fault, `SCORING_ONLY`, and one
family of models, the encoder, are in the scoring half alone. Both were fixed before any detector was tuned.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice, product
from typing import Literal

import torch

from experiments.detection_faults import KINDS, Fault
from experiments.detection_layers import candidate_layers
from experiments.detection_models import SETUPS, Schedule

Half = Literal["tuning", "scoring"]

FAULT_RUN_STEPS = 160
ONSETS = range(70, 111)  # a healthy baseline before, 50 steps or more after
SCORING_ONLY = ("entropy-collapse", "optimizer-state")

TOKENS = {"tuning": ["token-3"], "scoring": ["token-2", "token-4", "token-6"]}
CELLS = {"tuning": ["cell-softmax-2"], "scoring": ["cell-softmax-4"]}
SIGMOID = {"tuning": ["cell-sigmoid-2"], "scoring": ["cell-sigmoid-3", "cell-sigmoid-5"]}
ENCODERS: dict[str, list[str]] = {"tuning": [], "scoring": ["encoder-2", "encoder-4"]}
MLPS = {"tuning": ["mlp-4-sgd"], "scoring": ["mlp-6-sgd", "mlp-3-adamw"]}
CNNS = {"tuning": ["cnn-3-sgd"], "scoring": ["cnn-5-sgd", "cnn-4-adamw"]}

_TRANSFORMERS = (TOKENS, CELLS, SIGMOID, ENCODERS)
_ALL = (*_TRANSFORMERS, MLPS, CNNS)
_FAMILIES = {
    "nan-batch": (CELLS, SIGMOID, ENCODERS, MLPS, CNNS),  # tokens are integers
    "qk-growth": (TOKENS, CELLS, ENCODERS),
    "entropy-collapse": (TOKENS, CELLS, ENCODERS),
    "saturation": (SIGMOID,),
    "dying-relu": (ENCODERS, MLPS, CNNS),
    "initialisation": (*_TRANSFORMERS, MLPS),  # batch norm makes a convolution's scale meaningless
}

# (variant, strength) of every kind; what they mean is in experiments/detection_faults.py.
FORMS: dict[str, dict[str, list[tuple[str, float]]]] = {
    "nan-weight": {"tuning": [("nan", 0)], "scoring": [("nan", 0), ("inf", 0)]},
    "nan-gradient": {"tuning": [("inf", 0)], "scoring": [("nan", 0), ("inf", 0)]},
    "nan-batch": {"tuning": [("nan", 0)], "scoring": [("nan", 0), ("inf", 0)]},
    "scaled-weights": {
        "tuning": [("", 20), ("", 0.05)],
        "scoring": [("", 10), ("", 40), ("", 100), ("", 0.02)],
    },
    "qk-growth": {
        "tuning": [("", 1.08), ("", 1.12)],
        "scoring": [("", 1.05), ("", 1.06), ("", 1.1), ("", 1.15)],
    },
    "entropy-collapse": {
        "tuning": [],
        "scoring": [("query", 1.12), ("key", 1.12), ("query", 1.2), ("key", 1.2)],
    },
    "saturation": {
        "tuning": [("growth", 1.1), ("bias", 0.1)],
        "scoring": [("growth", 1.07), ("growth", 1.15), ("bias", 0.07), ("bias", 0.2)],
    },
    "learning-rate": {"tuning": [("", 50)], "scoring": [("", 30), ("", 100), ("", 300)]},
    "bad-batch": {"tuning": [("", 50)], "scoring": [("", 30), ("", 100)]},
    "label-noise": {"tuning": [("", 0.7)], "scoring": [("", 0.6), ("", 0.8), ("", 1)]},
    "optimizer-state": {
        "tuning": [],
        "scoring": [("scaled", 1e-6), ("scaled", 1e-3), ("nan", 0)],
    },
    "overflow": {
        "tuning": [("forward half", 2), ("backward half", 2)],
        "scoring": [
            ("forward half", 1.5),
            ("backward half", 4),
            ("forward bfloat16", 1.5),
            ("backward bfloat16", 1.5),
        ],
    },
    "initialisation": {"tuning": [("", 30)], "scoring": [("", 15), ("", 50)]},
    "dying-relu": {
        "tuning": [("gradual", 0.15), ("sudden", 15)],
        "scoring": [("gradual", 0.1), ("gradual", 0.3), ("sudden", 8), ("sudden", 30)],
    },
}


@dataclass(frozen=True)
class Size:
    """How large a half is.

    Attributes:
        draw: Seeds the generator of layers, onsets and seeds, together with the kind of fault.
        runs_per_kind: Runs with a fault of each kind.
        seeds: Of the runs with faults and their fault-free pairs.
        clean_steps: Length of each long clean run.
        large_runs: Clean runs of the 4-layer d-256 model.
        large_steps: Their length.
    """

    draw: str
    runs_per_kind: int
    seeds: range
    clean_steps: int
    large_runs: int
    large_steps: int


SIZES = {
    "tuning": Size("tuning", 8, range(100, 104), clean_steps=600, large_runs=1, large_steps=600),
    # The first scoring half ("scoring", seeds from 2000) was scored once and has been used for tuning since.
    "scoring": Size("scoring 2", 22, range(3000, 3006), clean_steps=700, large_runs=5, large_steps=1000),
}


@dataclass(frozen=True)
class Run:
    """One training of the suite.

    Attributes:
        setup: A key of `SETUPS`.
        seed: Of weights, batches and dropout.
        schedule: Of the learning rate.
        steps: Optimizer steps.
        batch_size: Samples a step.
        fault: What goes wrong, or None in a clean run.
    """

    setup: str
    seed: int
    schedule: Schedule
    steps: int
    batch_size: int
    fault: Fault | None = None

    @property
    def name(self) -> str:
        """A file name of its own."""
        parts: list[object] = [self.setup, self.seed, self.schedule, self.steps, f"b{self.batch_size}"]
        if self.fault is not None:
            fault = self.fault
            parts += [fault.kind, fault.variant, f"{fault.strength:g}", fault.layer, fault.step]
        return "_".join(str(part).replace(" ", "-") for part in parts)

    @property
    def pair(self) -> Run:
        """The same run without the fault."""
        return replace(self, fault=None)


def suite(half: Half) -> list[Run]:
    """All runs of a half, fault-free pairs first, then those with faults, then the long clean ones.

    Args:
        half: "tuning" or "scoring".

    Example:
        >>> runs = suite("scoring")
        >>> sum(run.fault is not None for run in runs)
        308
    """
    size = SIZES[half]
    setups = [setup for family in _ALL for setup in family[half]]
    pairs = [
        Run(setup, seed, "constant", FAULT_RUN_STEPS, SETUPS[setup].batch_size)
        for setup in setups
        for seed in size.seeds
    ]
    faulty = [run for kind in KINDS for run in _fault_runs(half, kind)]
    return [*pairs, *faulty, *_long_runs(half, setups)]


def _fault_runs(half: Half, kind: str) -> list[Run]:
    """Every form in every model in turn, at random layers, onsets and seeds."""
    generator = random.Random(f"{SIZES[half].draw} {kind}")
    setups = [setup for family in _FAMILIES.get(kind, _ALL) for setup in family[half]]
    combinations = list(product(setups, FORMS[kind][half]))
    generator.shuffle(combinations)
    runs: list[Run] = []
    for setup, (variant, strength) in islice(cycle(combinations), _num_runs(half, kind)):
        layer = generator.choice(_candidates(setup, KINDS[kind].sits_in))
        onset = 0 if kind == "initialisation" else generator.choice(ONSETS)
        fault = Fault(kind, variant, strength, layer, onset, seed=generator.randrange(2**31))
        seed = generator.choice(SIZES[half].seeds)
        runs.append(Run(setup, seed, "constant", FAULT_RUN_STEPS, SETUPS[setup].batch_size, fault))
    return runs


def _num_runs(half: Half, kind: str) -> int:
    return 0 if half == "tuning" and kind in SCORING_ONLY else SIZES[half].runs_per_kind


@cache
def _candidates(setup: str, sits_in: str | None) -> list[str | None]:
    with torch.random.fork_rng():
        return candidate_layers(SETUPS[setup].make_model(), sits_in)


def _long_runs(half: Half, setups: list[str]) -> list[Run]:
    """Every model under every schedule, and once more on batches of a quarter: natural loss noise."""
    size = SIZES[half]
    seed = size.seeds.stop
    schedules: tuple[Schedule, ...] = ("constant", "cosine", "restarts")
    runs = [
        Run(setup, seed, schedule, size.clean_steps, SETUPS[setup].batch_size)
        for setup in setups
        for schedule in schedules
    ]
    runs += [Run(setup, seed, "cosine", size.clean_steps, SETUPS[setup].batch_size // 4) for setup in setups]
    large = SETUPS["token-d256"].batch_size
    for i, schedule in zip(range(size.large_runs), cycle(schedules), strict=False):
        runs.append(Run("token-d256", seed + i, schedule, size.large_steps, large))
    return runs
