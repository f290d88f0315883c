"""Sigmoid rows in one pass over the keys: what is summed for each key, and what follows from the sums.

Keys meet the winners of their slots as in `softmax_rows`, and for the same reason: with s₁ the largest
weight, W = Σ s and L = Σ s (log₂ s₁ − log₂ s) over the others, the entropy of s/Σs in nats is

    log1p(W/s₁) + ln 2 · L / (s₁ + W),    log₂ s = x − log₂(1 + 2^x),   x = z c + b,

sums of positive terms, accurate also where one weight holds nearly everything. The bias b drops out of L.

Three special-function results a key (2^x, a reciprocal, log₂) are what the hardware has least of. Where no
loser of a tile has a weight above 0.043, which at the usual bias −ln(keys) is nearly everywhere, two suffice:
with qₖ = Σ sᵏ,

    Σ d = q₁ − q₂,   Σ d² = q₂ − 2q₃ + q₄,   Σ s ln(1 + e^x) = −Σ s ln(1 − s) = q₂ + q₃/2 + q₄/3 + …

where the next term, s⁵/4, is below 1e-6 of s, and nothing cancels or saturates.

Weights below 2⁻⁸⁰ lose digits and then underflow. A row whose largest weight is that small has its entropy
from `softmax_rows`: there ln σ(x) = x to every digit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.arithmetic import LN_2, LOG2_E, exp2, larger, log1p, log2, reciprocal, smaller
from stability.attention.triton.logits import EXCLUDED, largest_key, logits, sum_keys
from stability.attention.triton.softmax_rows import split_winners

SMALL = tl.constexpr(-4.5)  # log₂ of odds that belong to the weight 0.042
VANISHING = tl.constexpr(-80.0)
# At 2⁶⁴ a weight is 1 and its derivative below the smallest that is reported, 1e-15; and 2^x is finite.
LARGEST = tl.constexpr(64.0)


@triton.jit
def _weight(x):
    """Weight s, derivative s(1 − s) and log₂(1 + 2^x) at x ≤ 64, each accurate in relative terms."""
    odds = exp2(x)
    complement = reciprocal(1.0 + odds)
    s = odds * complement
    return s, s * complement, log2(1.0 + odds)


@triton.jit
def _add(
    z, c, b, highest, winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max, SATURATED: tl.constexpr
):
    """Takes a tile of logits z into the winners and the sums.

    Args:
        z: [rows, keys / 8, 4, 2].
        c: Factor that takes z to units of ln 2.
        b: [rows], bias in units of ln 2.
        highest: [rows], the z at which z c + b = 64.
        winners: As z.
        w: [rows, 4], Σ s.
        y: [rows, 4], Σ s z.
        g: [rows, 4], Σ s log₂(1 + 2^x).
        d_sum: [rows, 4], Σ s(1 − s).
        d_squares: [rows, 4], its squares.
        d_max: [rows, 4], its maximum over the tiles with large weights.
        saturated: [rows, 4], number of keys with s above SATURATED.
        small_max: [rows, 4], largest z in the tiles without large weights.
        SATURATED: A weight.
    """
    loser = smaller(winners, z)
    winners = larger(winners, z)
    largest = largest_key(loser)
    if tl.max(largest * c + b[:, None]) < SMALL:
        odds = exp2(loser * c + b[:, None, None, None])
        s = odds * reciprocal(1.0 + odds)
        s2 = s * s
        q1 = sum_keys(s)
        q2 = sum_keys(s2)
        q3 = sum_keys(s2 * s)
        q4 = sum_keys(s2 * s2)
        w += q1
        y += sum_keys(s * loser)
        g += LOG2_E * (q2 + q3 * (1 / 2) + q4 * (1 / 3))
        d_sum += q1 - q2
        d_squares += q2 - 2.0 * q3 + q4
        small_max = tl.maximum(small_max, largest)
    else:
        loser = smaller(loser, highest[:, None, None, None])
        s, d, softplus = _weight(loser * c + b[:, None, None, None])
        w += sum_keys(s)
        y += sum_keys(s * loser)
        g += sum_keys(s * softplus)
        d_sum += sum_keys(d)
        d_squares += sum_keys(d * d)
        d_max = tl.maximum(d_max, largest_key(d))
        saturated += sum_keys(tl.where(s > SATURATED, 1.0, 0.0))
    return winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max


@triton.jit
def sigmoid_sums(
    source, free, end, c, b, highest, SATURATED: tl.constexpr,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Winners, sums and number of keys, up to `end`; up to `free` none is excluded."""
    zeros = tl.zeros([BLOCK_ROWS, 4], tl.float32)
    winners = tl.full([BLOCK_ROWS, BLOCK_KEYS // 8, 4, 2], EXCLUDED, tl.float32)
    w, y, g, d_sum, d_squares, d_max, saturated = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    small_max = zeros + EXCLUDED
    num_keys = zeros
    for start in range(0, free, BLOCK_KEYS):
        z = logits(
            source, start, False, HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST,
            BLOCK_ROWS, BLOCK_KEYS,
        )  # fmt: skip
        winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max = _add(
            z, c, b, highest, winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max, SATURATED
        )
    for start in range(free, end, BLOCK_KEYS):
        z = logits(
            source, start, True, HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST,
            BLOCK_ROWS, BLOCK_KEYS,
        )  # fmt: skip
        num_keys += sum_keys(tl.where(z == EXCLUDED, 0.0, 1.0))
        winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max = _add(
            z, c, b, highest, winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max, SATURATED
        )
    num_keys = tl.sum(num_keys, 1) + free
    return winners, w, y, g, d_sum, d_squares, d_max, saturated, small_max, num_keys


@triton.jit
def sigmoid_row(
    winners, c, b, highest, w, y, g, d_sum, d_squares, d_max, saturated, small_max, num_keys,
    SATURATED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Joins the four threads' sums and the winners.

    Returns:
        Largest logit (in units of z), entropy, √Σd², Σ d, max d, Σ s and the share of saturated keys of each
        row [rows], with d = s(1 − s).
    """
    m, rest = split_winners(winners, ROWS, KEYS)
    rest = smaller(rest, highest[:, None])
    s, d, softplus = _weight(rest * c + b[:, None])
    top = tl.minimum(m, highest)
    s1, d1, softplus1 = _weight(top * c + b)
    w = tl.sum(w, 1) + tl.sum(s, 1)
    y = tl.sum(y, 1) + tl.sum(s * rest, 1)
    g = tl.sum(g, 1) + tl.sum(s * softplus, 1)
    distance = c * (top * w - y) - (softplus1 * w - g)
    row_sum = s1 + w
    entropy = log1p(w / s1) + LN_2 * distance / row_sum

    d_small = _weight(tl.max(small_max, 1) * c + b)[1]
    d_max = tl.maximum(tl.maximum(tl.max(d_max, 1), tl.max(d, 1)), tl.maximum(d1, d_small))
    saturated = tl.sum(saturated, 1) + tl.sum(tl.where(s > SATURATED, 1.0, 0.0), 1)
    saturated += tl.where(s1 > SATURATED, 1.0, 0.0)
    return (
        tl.where(w != w, w, m),  # a NaN may have lost its place among the winners, but not in the sums
        tl.where(w == 0.0, 0.0, entropy),
        tl.sqrt(tl.sum(d_squares, 1) + tl.sum(d * d, 1) + d1 * d1),
        tl.sum(d_sum, 1) + tl.sum(d, 1) + d1,
        tl.where(w != w, w, d_max),
        row_sum,
        saturated / tl.maximum(num_keys, 1.0),
    )
