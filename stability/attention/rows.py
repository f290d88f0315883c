"""Which query rows of an attention call are measured: all, a stratified sample, or given ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Coverage = Literal["all", "sampled", "given"]

# Larger than any stratum, so that the remainder below is uniform to one part in 2³¹/stratum.
_RANDOM_RANGE = 2**31


class SelectedRows(NamedTuple):
    """Rows to measure.

    Attributes:
        rows: [batch, num_rows] int64 positions, always within the tokens.
        weights: [batch, num_rows] int64, how many rows each stands for; 0 for padding and empty strata.
        coverage: "all", "sampled" or "given".
    """

    rows: Tensor
    weights: Tensor
    coverage: Coverage


def select_rows(
    rows: int | Tensor | None,
    *,
    batch: int,
    tokens: int,
    lengths: Tensor | None,
    device: torch.device,
    seed: int,
    first_sample: int = 0,
) -> SelectedRows:
    """Chooses query rows without reading anything from the device.

    A sample of R rows cuts the L valid rows of a sequence into R strata [⌊iL/R⌋, ⌊(i + 1)L/R⌋) and takes one
    row uniformly from each, so its rows are distinct and sorted. Weighted by the strata's sizes, the sample
    mean is unbiased. With L < R the sample is the whole sequence, and R − L strata are empty.

    Args:
        rows: None or at least `tokens` for all rows; a number of rows to sample per sequence; or an integer
            tensor of positions, [num_rows] or [batch, num_rows].
        batch: Number of sequences.
        tokens: Number of query rows, padding included.
        lengths: [batch] numbers of valid rows, int64, on `device`.
        device: Where the result goes.
        seed: Seed of the sample, which is the same on every device.
        first_sample: Number of sequences that other processes hold before these: a sequence gets the same
            rows wherever it is.

    Returns:
        Positions, weights and coverage.

    Raises:
        TypeError: `rows` is neither None, nor an integer, nor an integer tensor.
        ValueError: No rows, positions out of range (checked on the CPU only), or a wrong shape.
    """
    if isinstance(rows, Tensor):
        return _given_rows(rows, batch, tokens, lengths, device)
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise TypeError(f"`rows` must be None, an integer or an integer tensor; got {type(rows).__name__}.")
    if rows is not None and rows < 1:
        raise ValueError(f"`rows` must be at least 1, or None for all rows; got {rows}.")
    if rows is None or rows >= tokens:
        everything = torch.arange(tokens, device=device).expand(batch, tokens)
        if lengths is None:
            return SelectedRows(everything, torch.ones_like(everything[:1]).expand(batch, tokens), "all")
        return SelectedRows(everything, _is_valid(everything, tokens, lengths).long(), "all")
    # Drawn on the CPU, where the generator's state is: the copy to the device waits for nothing. Without
    # lengths from the device all else is found there as well, once for all layers of a step.
    if lengths is None:
        sample = _sample(rows, batch, tokens, seed, first_sample)
        positions, sizes = sample.to(device, non_blocking=True, copy=True)
        return SelectedRows(positions, sizes, "sampled")
    draw = _draw(rows, batch, seed, first_sample).to(device, non_blocking=True)
    edges = torch.arange(rows + 1, device=device) * lengths[:, None] // rows
    positions, sizes = _one_of_each(edges, draw)
    return SelectedRows(positions.clamp_(max=tokens - 1), sizes, "sampled")


@lru_cache(maxsize=4)
def _sample(num_rows: int, batch: int, tokens: int, seed: int, first_sample: int) -> Tensor:
    """Rows and sizes of the strata of sequences without padding, on the CPU: [2, batch, num_rows]."""
    edges = (torch.arange(num_rows + 1, device="cpu") * tokens // num_rows).expand(batch, -1)
    return _one_of_each(edges, _draw(num_rows, batch, seed, first_sample))


@lru_cache(maxsize=1)
def _draw(num_rows: int, batch: int, seed: int, first_sample: int) -> Tensor:
    """A random number for each row of each sequence, [batch, num_rows]."""
    generator = torch.Generator().manual_seed(seed)
    size = first_sample + batch, num_rows
    return torch.randint(_RANDOM_RANGE, size, generator=generator, device="cpu")[first_sample:]


def _one_of_each(edges: Tensor, draw: Tensor) -> Tensor:
    """A row of each stratum between the edges [batch, strata + 1], and its size: [2, batch, strata]."""
    start = edges[:, :-1]
    size = edges[:, 1:] - start
    return torch.stack([start + draw % size.clamp(min=1), size])


def _given_rows(
    rows: Tensor, batch: int, tokens: int, lengths: Tensor | None, device: torch.device
) -> SelectedRows:
    if rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool:
        raise TypeError(f"`rows` must hold integer positions; got {rows.dtype}.")
    if rows.ndim not in (1, 2) or rows.numel() == 0 or (rows.ndim == 2 and rows.shape[0] != batch):
        raise ValueError(
            f"`rows` must have shape [num_rows] or [batch, num_rows] with batch = {batch}; "
            f"got {tuple(rows.shape)}."
        )
    if rows.device.type == "cpu" and (rows.min() < 0 or rows.max() >= tokens):
        raise ValueError(
            f"`rows` must lie within 0 and {tokens - 1}; got {rows.min().item()} to {rows.max().item()}."
        )
    rows = rows.to(device=device, dtype=torch.int64, non_blocking=True).expand(batch, rows.shape[-1])
    return SelectedRows(rows.clamp(0, tokens - 1), _is_valid(rows, tokens, lengths).long(), "given")


def _is_valid(rows: Tensor, tokens: int, lengths: Tensor | None) -> Tensor:
    end = tokens if lengths is None else lengths[:, None]
    return (rows >= 0) & (rows < end)
