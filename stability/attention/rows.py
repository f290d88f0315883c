"""Which query rows of an attention call are measured: all, a stratified sample, or given ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stability.attention.call import AttentionCall

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


class RowSelection:
    """Selects the rows of one attention call after the other, and of calls alike only once.

    The layers of a model mostly are alike. What is selected is shared between them and not to be written to.

    Args:
        rows: As :func:`select_rows` takes them.
        seed: Seed of a sample.

    Example:
        >>> query = torch.zeros(1, 2, 3, 4)
        >>> call, selection = AttentionCall("softmax", query, query), RowSelection(None, seed=0)
        >>> selection.of(call, None).rows
        tensor([[0, 1, 2]])
        >>> selection.of(call, None) is selection.of(call, None)
        True
    """

    def __init__(self, rows: int | Tensor | None, seed: int) -> None:
        self._rows = rows
        self._seed = seed
        # With the lengths, which stay alive: nothing else gets their id.
        self._known: dict[Hashable, tuple[SelectedRows, object]] = {}

    def of(self, call: AttentionCall, lengths: Tensor | None, first_sample: int = 0) -> SelectedRows:
        """The rows of a call.

        Args:
            call: Its arguments as they were given.
            lengths: Its checked `query_lengths`, [batch] int64 on the query's device.
            first_sample: As :func:`select_rows` takes it.

        Returns:
            Positions, weights and coverage.

        Raises:
            TypeError: See :func:`select_rows`.
            ValueError: See :func:`select_rows`.
        """
        batch, _, tokens, _ = call.query.shape
        device = call.query.device
        # On another stream they might be read before they are there.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        alike = batch, tokens, device, stream, first_sample, _state_of(call.query_lengths)
        if alike not in self._known:
            selected = select_rows(
                self._rows,
                batch=batch,
                tokens=tokens,
                lengths=lengths,
                device=device,
                seed=self._seed,
                first_sample=first_sample,
            )
            self._known[alike] = selected, call.query_lengths
        return self._known[alike][0]


def _state_of(lengths: Tensor | Sequence[int] | None) -> Hashable:
    """Equal for lengths that are the same and have not been changed in between, without reading them."""
    if isinstance(lengths, Tensor):  # inference tensors count no versions, and cannot be changed in training
        return id(lengths), 0 if lengths.is_inference() else lengths._version
    return None if lengths is None else tuple(lengths)


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
    # lengths from the device all else is found there as well.
    generator = torch.Generator().manual_seed(seed)
    size = first_sample + batch, rows
    draw = torch.randint(_RANDOM_RANGE, size, generator=generator, device="cpu")[first_sample:]
    if lengths is None:
        edges = (torch.arange(rows + 1, device="cpu") * tokens // rows).expand(batch, -1)
        positions, sizes = _one_of_each(edges, draw).to(device, non_blocking=True)
        return SelectedRows(positions, sizes, "sampled")
    edges = torch.arange(rows + 1, device=device) * lengths[:, None] // rows
    positions, sizes = _one_of_each(edges, draw.to(device, non_blocking=True))
    return SelectedRows(positions.clamp_(max=tokens - 1), sizes, "sampled")


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
