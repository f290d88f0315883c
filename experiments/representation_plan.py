"""The plan of the representation experiment: sizes, budgets, grid, seeds, and how rates are chosen.

Fixed before any result; docs/representations.md says why. Both mechanisms have the same runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.cell_transformer import MECHANISMS, Mechanism
from experiments.run_config import RunConfig

Purpose = Literal["selection", "final"]
SELECTION_SEED = 1000  # none of the final seeds
NUM_SEEDS = 10


@dataclass(frozen=True)
class RepresentationConfig(RunConfig):
    """A run on one data set.

    Attributes:
        dataset: Of the prepared file.
        purpose: "selection" tries a learning rate, and keeps no embeddings; "final" is judged.
        validate_every: Steps between two looks at the validation cells.
        patience: Looks without a new best after which training ends; the best weights are kept.
    """

    dataset: str = ""
    purpose: Purpose = "final"
    validate_every: int = 50
    patience: int = 10


@dataclass(frozen=True)
class Scale:
    """What a preset decides.

    Attributes:
        learning_rates: The grid.
        settings: Fields of `RepresentationConfig`.
    """

    learning_rates: tuple[float, ...]
    settings: dict[str, Any]


_COMMON: dict[str, Any] = {"task": "ranks", "preset": "laptop", "clip_norm": 1.0}

SCALES = {
    # 4.74 million parameters in the blocks, at least 5.17 with the genes of the smallest data set.
    "full": Scale(
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
        settings={
            **_COMMON,
            "model": {"embed_dim": 256, "num_layers": 6, "num_heads": 4},
            "tokens": 2048,  # as Geneformer
            "batch_size": 4,
            "steps": 1500,
        },
    ),
    "laptop": Scale(
        learning_rates=(1e-3, 3e-3),
        settings={
            **_COMMON,
            "model": {"embed_dim": 64, "num_layers": 2, "num_heads": 2},
            "tokens": 512,
            "batch_size": 4,
            "steps": 200,
            "warmup_steps": 20,
            "validate_every": 25,
        },
    ),
    "tiny": Scale(
        learning_rates=(1e-3, 1e-2),
        settings={
            **_COMMON,
            "model": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
            "tokens": 32,
            "batch_size": 4,
            "steps": 20,
            "warmup_steps": 2,
            "validate_every": 5,
            "patience": 2,
        },
    ),
}


def run_config(
    scale: str, dataset: str, mechanism: Mechanism, purpose: Purpose, *, seed: int, learning_rate: float
) -> RepresentationConfig:
    """One run.

    Args:
        scale: A key of `SCALES`.
        dataset: Of the prepared file.
        mechanism: "softmax" or "sigmoid".
        purpose: See `RepresentationConfig`.
        seed: Of initial weights, order of cells and masks.
        learning_rate: Of AdamW, after warm-up.

    Returns:
        Its configuration.

    Example:
        >>> run_config("tiny", "gut", "sigmoid", "selection", seed=1000, learning_rate=1e-3).name
        'tiny-gut-sigmoid-rate0.001'
    """
    ending = f"seed{seed}" if purpose == "final" else f"rate{learning_rate:g}"
    return RepresentationConfig(
        name=f"{scale}-{dataset}-{mechanism}-{ending}",
        mechanism=mechanism,
        dataset=dataset,
        purpose=purpose,
        seed=seed,
        learning_rate=learning_rate,
        **SCALES[scale].settings,
    )


def selection_runs(scale: str, dataset: str, mechanism: Mechanism) -> list[RepresentationConfig]:
    """The runs that choose the learning rate of one mechanism on one data set."""
    return [
        run_config(scale, dataset, mechanism, "selection", seed=SELECTION_SEED, learning_rate=rate)
        for rate in SCALES[scale].learning_rates
    ]


def best_rate(validation_losses: dict[float, float]) -> float:
    """The learning rate with the lowest validation loss; of equal ones the lower rate.

    Args:
        validation_losses: Best validation loss of each learning rate.

    Returns:
        The rate.

    Example:
        >>> best_rate({1e-3: 5.0, 3e-3: 4.5, 1e-2: 7.0})
        0.003
    """
    return min(sorted(validation_losses), key=validation_losses.__getitem__)


def pairs(datasets: Sequence[str]) -> Iterator[tuple[str, Mechanism]]:
    """Each data set with each mechanism."""
    for dataset in datasets:
        for mechanism in MECHANISMS:
            yield dataset, mechanism
