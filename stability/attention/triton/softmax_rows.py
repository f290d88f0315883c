"""Softmax rows in one pass over the keys: what is summed for each key, and what follows from the sums.

The formulas of `stability.row_moments` want sums over every key but the largest, in units near the second
largest. Taking the largest out of a sum again would cancel; here it never gets in. Every slot of a tile, a
pair of neighbouring keys of a row, keeps the largest logit it has met, its winner. The keys of a new pair
meet each other, then the larger one meets the winner; the two losers z are added to the sums, and the row's
largest logit never loses. The winners but the largest are added at the end. That costs a minimum and a
maximum a key, and the maximum of the losers for their unit:

    A ← max(A, z c),   Tₖ = Σ 2^{k(z c − A)} for k = 1..4,   E = Σ 2^{z c − A} (z c − A),   c = scale · log₂ e

No exponent is positive, so nothing overflows. On tensor cores four threads share the rows of a tile, and each
keeps sums of its own, with a unit of its own: nothing is exchanged between threads before the end. That is
the axis of length 4 of tiles [rows, keys / 8, 4, 2] and of sums [rows, 4].

The entropy of sigmoid weights s/Σs is that of the softmax of ln s. Where it needs care, it is taken here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.arithmetic import LN_2, exp2, larger, log1p, log2, smaller
from stability.attention.triton.logits import EXCLUDED, largest_key, logits, sum_keys

# Units stay above this, so that excluded keys alone do not come out as keys of equal weight.
SMALLEST_UNIT = tl.constexpr(-1.0e20)


@triton.jit
def _add(z, c, winners, unit, t1, t2, t3, t4, e):
    """Takes a tile of logits z into the winners and the sums."""
    left, right = tl.split(z)
    high = larger(left, right)
    loser = tl.join(smaller(left, right), smaller(winners, high))
    winners = larger(winners, high)
    new_unit = tl.maximum(unit, largest_key(loser) * c)
    shift = unit - new_unit
    f = exp2(shift)
    f2 = f * f
    x = loser * c - new_unit[:, None, :, None]
    r = exp2(x)
    r2 = r * r
    e = f * (e + shift * t1) + sum_keys(r * x)
    t1 = f * t1 + sum_keys(r)
    t2 = f2 * t2 + sum_keys(r2)
    t3 = f2 * f * t3 + sum_keys(r2 * r)
    t4 = f2 * f2 * t4 + sum_keys(r2 * r2)
    return winners, new_unit, t1, t2, t3, t4, e


@triton.jit
def log_sigmoid(x):
    """Log₂ σ for the logit x in units of ln 2."""
    return smaller(x, 0.0) - log2(1.0 + exp2(-tl.abs(x)))


@triton.jit
def softmax_sums(
    source, free, end, c, b, IS_SIGMOID: tl.constexpr,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Winners and sums over the keys up to `end`; up to `free` none is excluded.

    With IS_SIGMOID the softmax is that of the logarithms of the sigmoid weights at z c + b, in units of ln 2.
    """
    zeros = tl.zeros([BLOCK_ROWS, 4], tl.float32)
    winners = tl.full([BLOCK_ROWS, BLOCK_KEYS // 8, 4], EXCLUDED, tl.float32)
    unit = zeros + SMALLEST_UNIT
    t1, t2, t3, t4, e = zeros, zeros, zeros, zeros, zeros
    for EXCLUDE in tl.static_range(2):
        for start in range(free if EXCLUDE else 0, end if EXCLUDE else free, BLOCK_KEYS):
            z = logits(
                source, start, EXCLUDE, HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST,
                BLOCK_ROWS, BLOCK_KEYS,
            )  # fmt: skip
            if IS_SIGMOID:
                z = log_sigmoid(z * c + b)
            winners, unit, t1, t2, t3, t4, e = _add(
                z, 1.0 if IS_SIGMOID else c, winners, unit, t1, t2, t3, t4, e
            )
    return winners, unit, t1, t2, t3, t4, e


@triton.jit
def _split_winners(winners, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The largest winner [rows] and the others [rows, slots], `EXCLUDED` in its place."""
    winners = tl.reshape(winners, [ROWS, SLOTS])
    largest, index = tl.max(winners, 1, return_indices=True)
    return largest, tl.where(tl.arange(0, SLOTS)[None, :] == index[:, None], EXCLUDED, winners)


@triton.jit
def softmax_row(winners, c, unit, t1, t2, t3, t4, e, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Joins the four threads' sums and the winners.

    Returns:
        Largest logit (in units of z), ln Σ e^{z − max}, entropy, ‖J‖_F, off-diagonal share, trace J and
        p₁(1 − p₁) of each row [rows]; formulas in `stability.row_moments`.
    """
    m, rest = _split_winners(winners, ROWS, SLOTS)
    joint = tl.maximum(tl.max(unit, 1), tl.max(rest, 1) * c)
    shift = unit - joint[:, None]
    f = exp2(shift)
    f2 = f * f
    x = rest * c - joint[:, None]
    r = exp2(x)
    r2 = r * r
    e = tl.sum(f * (e + shift * t1), 1) + tl.sum(r * x, 1)
    t1 = tl.sum(f * t1, 1) + tl.sum(r, 1)
    t2 = tl.sum(f2 * t2, 1) + tl.sum(r2, 1)
    t3 = tl.sum(f2 * f * t3, 1) + tl.sum(r2 * r, 1)
    t4 = tl.sum(f2 * f2 * t4, 1) + tl.sum(r2 * r2, 1)

    gap = m * c - joint  # log₂(p₁/P), where P is the probability that is the unit of the sums
    relative = exp2(-gap) * t1  # (1 − p₁)/p₁
    log_denominator = log1p(relative)
    p1 = 1.0 / (1.0 + relative)
    p = exp2(-gap) * p1
    entropy = log_denominator + tl.where(p == 0.0, 0.0, p * LN_2 * (gap * t1 - e))
    s2 = p1 * p1 + p * p * t2
    energy = p1 * p1 * (t1 * t1 + t2) + t2 * (1.0 + s2) - 2.0 * p * t3
    off_diagonal = 2.0 * p1 * p1 * t2 + p * p * (t2 * t2 - t4)
    return (
        tl.where(t1 != t1, t1, m),  # a NaN may have lost its place among the winners, but not in the sums
        log_denominator,
        entropy,
        p * tl.sqrt(energy),
        tl.where(t2 == 0.0, 0.0, off_diagonal / energy),
        p * (t1 * (1.0 + p1) - p * t2),
        p1 * p * t1,
    )
