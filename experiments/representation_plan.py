"""The plan of the representation experiment: sizes, budgets, rates, seeds, and how a rate is chosen.

Fixed before the runs that count; docs/representations.md says why, and what a pilot changed. Both mechanisms
have the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from experiments.cell_transformer import MECHANISMS, Mechanism
from experiments.run_config import RunConfig

Purpose = Literal["selection", "final"]
FIRST_SELECTION_SEED = 1000  # none of the final seeds
NUM_SEEDS = 10


@dataclass(frozen=True)
class RepresentationConfig(RunConfig):
    """A run on one data set.

    Attributes:
        dataset: Of the prepared file.
        data_digest: Of its cells, types and split; see `PreparedCells.digest`.
        purpose: "selection" tries a learning rate, and keeps no embeddings; "final" is judged.
        validate_every: Steps between two looks at the validation cells.
        patience: Looks without a new best after which training ends; the best weights are kept.
    """

    dataset: str = ""
    data_digest: str = ""
    purpose: Purpose = "final"
    validate_every: int = 50
    patience: int = 10


@dataclass(frozen=True)
class Scale:
    """What a preset decides.

    Attributes:
        rates: Learning rates that may be tried, rising.
        first_rates: Those that are tried in any case; the others where the best of these is at an edge.
        selection_seeds: Runs that try a rate.
        settings: Fields of `RepresentationConfig`; "steps" ends a run that tries a rate at the latest.
        final_steps: Where a final run does.
        first_seed: Of the final runs.
    """

    rates: tuple[float, ...]
    first_rates: tuple[float, ...]
    selection_seeds: int
    settings: dict[str, Any]
    final_steps: int
    first_seed: int = 0


_COMMON: dict[str, Any] = {"task": "ranks", "preset": "laptop", "clip_norm": 1.0}

SCALES = {
    # 4.74 million parameters in the blocks, at least 5.17 with the genes of the smallest data set.
    "full": Scale(
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        first_rates=(3e-4, 1e-3, 3e-3),
        selection_seeds=3,
        settings={
            **_COMMON,
            "model": {"embed_dim": 256, "num_layers": 6, "num_heads": 4},
            "tokens": 2048,  # as Geneformer
            "batch_size": 4,
            "steps": 1500,
        },
        final_steps=6000,
        first_seed=10,  # 0 to 9 are the pilot's
    ),
    "laptop": Scale(
        rates=(1e-3, 3e-3),
        first_rates=(1e-3, 3e-3),
        selection_seeds=1,
        settings={
            **_COMMON,
            "model": {"embed_dim": 64, "num_layers": 2, "num_heads": 2},
            "tokens": 512,
            "batch_size": 4,
            "steps": 200,
            "warmup_steps": 20,
            "validate_every": 25,
        },
        final_steps=200,
    ),
    "tiny": Scale(
        rates=(1e-3, 1e-2),
        first_rates=(1e-3, 1e-2),
        selection_seeds=1,
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
        final_steps=20,
    ),
}


def run_config(
    scale: str,
    dataset: str,
    mechanism: Mechanism,
    purpose: Purpose,
    *,
    seed: int,
    learning_rate: float,
    data_digest: str = "",
) -> RepresentationConfig:
    """One run.

    Args:
        scale: A key of `SCALES`.
        dataset: Of the prepared file.
        mechanism: "softmax" or "sigmoid".
        purpose: See `RepresentationConfig`.
        seed: Of initial weights, order of cells and masks.
        learning_rate: Of AdamW, after warm-up.
        data_digest: See `RepresentationConfig`.

    Returns:
        Its configuration.

    Example:
        >>> run_config("tiny", "gut", "sigmoid", "selection", seed=1000, learning_rate=1e-3).name
        'tiny-gut-sigmoid-rate0.001-seed1000'
    """
    settings = SCALES[scale].settings
    tried = f"rate{learning_rate:g}-" if purpose == "selection" else ""
    if purpose == "final":
        settings = {**settings, "steps": SCALES[scale].final_steps}
    return RepresentationConfig(
        name=f"{scale}-{dataset}-{mechanism}-{tried}seed{seed}",
        mechanism=mechanism,
        dataset=dataset,
        data_digest=data_digest,
        purpose=purpose,
        seed=seed,
        learning_rate=learning_rate,
        **settings,
    )


def selection_runs(
    scale: str, dataset: str, mechanism: Mechanism, rate: float, data_digest: str = ""
) -> list[RepresentationConfig]:
    """The runs that try one learning rate with one mechanism on one data set."""
    first = FIRST_SELECTION_SEED
    return [
        run_config(
            scale, dataset, mechanism, "selection", seed=seed, learning_rate=rate, data_digest=data_digest
        )
        for seed in range(first, first + SCALES[scale].selection_seeds)
    ]


def best_rate(validation_losses: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate with the lowest mean validation loss over its seeds; of equal ones the lower rate.

    Args:
        validation_losses: Lowest validation loss of each seed, by learning rate.

    Returns:
        The rate; None if at every rate the loss of some seed is no finite number.

    Example:
        >>> best_rate({1e-3: [5.0, 5.2], 3e-3: [4.5, 4.6], 1e-2: [4.0, float("nan")]})
        0.003
    """
    means = {rate: fmean(losses) for rate, losses in sorted(validation_losses.items())}
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=finite.__getitem__, default=None)


def further_rates(
    rates: Sequence[float], tried: Iterable[float], best: Iterable[float | None]
) -> list[float]:
    """The rates next to the tried ones, on the sides where a mechanism was best; all mechanisms try them.

    Args:
        rates: All that may be tried, rising.
        tried: Those that were, without gaps.
        best: The best of each mechanism.

    Returns:
        None, one or two.

    Example:
        >>> further_rates((1, 2, 3, 4, 5), tried=(2, 3, 4), best=(3, 4))
        [5]
    """
    places = [rates.index(rate) for rate in tried]
    found = []
    for edge, beyond in ((min(places), min(places) - 1), (max(places), max(places) + 1)):
        if rates[edge] in best and 0 <= beyond < len(rates):
            found.append(rates[beyond])
    return found


def pairs(datasets: Sequence[str]) -> Iterator[tuple[str, Mechanism]]:
    """Each data set with each mechanism."""
    for dataset in datasets:
        for mechanism in MECHANISMS:
            yield dataset, mechanism
