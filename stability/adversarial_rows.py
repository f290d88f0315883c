"""Rows of logits that strain the bounds on the softmax Jacobian: the ends of the range, and hill climbing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stability.jacobian import softmax_spectral_norm


def extreme_rows(num_keys: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Ties with the other keys far below, two leaders a hair apart, and logits at the ends of the range.

    Args:
        num_keys: Keys in a row.
        dtype: float32 or float64.
        device: Where to put them.

    Returns:
        Finite logits [rows, num_keys]; the first row ties the two leaders.

    Example:
        >>> extreme_rows(3, torch.float64, "cpu")[2]
        tensor([  0.,   0., -10.], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    rows = list(_leaders_and_rest(num_keys, [0.0, 1.0, 10.0, 40.0, 100.0, 800.0, 1e4, info.max]))
    smallest_subnormal = info.smallest_normal * info.eps
    for gap in (smallest_subnormal, info.smallest_normal, info.eps, 1e-8, 1e-4, 1e-2, 1.0, info.max):
        rows += [[0.0, -gap, *[-1e4] * num_keys], [gap, 0.0, *[-1e4] * num_keys]]
    rows += [[1e4, -1e4] * num_keys, [info.max, -info.max] * num_keys, [info.max] * num_keys]
    return torch.tensor([row[:num_keys] for row in rows], dtype=dtype, device=device)


def climb(rows: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
    """Random ascent on the softmax Jacobian's spectral norm; every row is its own climber.

    Args:
        rows: Starting logits [rows, num_keys], float32 or float64, finite.
        num_steps: Proposals made to each climber; their size shrinks from 10 by 3 % a step.
        generator: On the rows' device.

    Returns:
        Logits [rows, num_keys], none with a smaller norm than it started from.

    Example:
        >>> summit = climb(torch.zeros(32, 4), 200, torch.Generator().manual_seed(0))
        >>> f"{softmax_spectral_norm(summit).max():.4f}"
        '0.5000'
    """
    best = softmax_spectral_norm(rows)
    for step in range(num_steps):
        noise = torch.randn(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
        proposal = rows + noise * 10 * 0.97**step
        value = softmax_spectral_norm(proposal)
        is_better = value > best
        rows = torch.where(is_better.unsqueeze(-1), proposal, rows)
        best = torch.where(is_better, value, best)
    return rows


def _leaders_and_rest(num_keys: int, depths: Sequence[float]) -> Iterator[list[float]]:
    """Some keys tied at 0 and the others below."""
    for num_leaders in (2, 1, 3, num_keys):
        for depth in depths:
            yield [0.0] * num_leaders + [-depth] * num_keys
