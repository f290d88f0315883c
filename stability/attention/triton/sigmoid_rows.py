"""Sigmoid rows in one pass over the keys: what is summed for each key, and what follows from the sums.

With the weights s = σ(x ln 2) at x = z c + b, W = Σ s and L = Σ s log₂ s, the entropy of s/Σs in nats is

    ln W − ln 2 · L / W,    log₂ s = x − log₂(1 + 2^x).

Where one weight holds nearly everything, the difference cancels, and weights below 2⁻⁸⁰ lose digits and then
underflow. Rows of either kind get their entropy from a second pass, `softmax_sums`.

Three special-function results a key (2^x, a reciprocal, log₂) are what the hardware has least of. Where no
weight of a tile is above 0.03, which at the usual bias −ln(keys) is nearly everywhere, 2^x suffices: s is a
cubic in 2^x, and Σ s ln(1 + e^x) = −Σ s ln(1 − s) follows from the sums of s, d = s(1 − s) and d²,

    −s ln(1 − s) ≈ 1.263 s² − 0.263 s²(1 − s)² = 1.263 (s − d) − 0.263 d².
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.arithmetic import LN_2, exp2, log2, reciprocal, smaller
from stability.attention.triton.logits import EXCLUDED, largest_key, logits, sum_keys

SMALL = tl.constexpr(-5.0)  # log₂ of odds that belong to the weight 0.0303
# The relative error of u (1 + u (SQUARE + u CUBE)) for u/(1 + u) is at most 1.2e-6 up to u = 2⁻⁵.
SQUARE = tl.constexpr(-0.99959703)
CUBE = tl.constexpr(0.95791844)
# Of −log₂(1 − s), as in the formula above: off by less than 1e-6 of s.
SOFTPLUS_S2 = tl.constexpr(1.8214500)
SOFTPLUS_D2 = tl.constexpr(-0.3791029)

# Entropies below this and weights below 2⁻⁸⁰ are left to the second pass.
DOMINATED = tl.constexpr(0.5)
VANISHING = tl.constexpr(-80.0)
# At 2⁶⁴ a weight is 1 and its derivative below the smallest that is reported, 1e-15; and 2^x is finite.
LARGEST = tl.constexpr(64.0)


@triton.jit
def _weight(x):
    """Weight s, derivative s(1 − s) and log₂ s at x ≤ 64, the first two accurate in relative terms."""
    odds = exp2(x)
    complement = reciprocal(1.0 + odds)
    s = odds * complement
    return s, s * complement, x - log2(1.0 + odds)


@triton.jit
def _add(z, c, b, m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, SATURATED: tl.constexpr):
    """Takes a tile of logits z into the sums.

    Args:
        z: [rows, keys / 8, 4, 2].
        c: Factor that takes z to units of ln 2.
        b: Bias in units of ln 2.
        m: [rows, 4], largest z.
        small_max: [rows, 4], largest z in the tiles without large weights.
        w: [rows, 4], Σ s.
        log_sum: [rows, 4], Σ s log₂ s.
        d_sum: [rows, 4], Σ s(1 − s).
        d_squares: [rows, 4], its squares.
        d_max: [rows, 4], its maximum over the tiles with large weights.
        saturated: [rows, 4], number of keys with s above SATURATED.
        SATURATED: A weight.
    """
    largest = largest_key(z)
    m = tl.maximum(m, largest)
    x = z * c + b
    if tl.max(largest) * c + b < SMALL:
        odds = exp2(x)
        s = odds + odds * odds * (SQUARE + CUBE * odds)
        d = s - s * s
        tile_w = sum_keys(s)
        tile_d = sum_keys(d)
        tile_d_squares = sum_keys(d * d)
        log_sum += sum_keys(s * x) - (SOFTPLUS_S2 * (tile_w - tile_d) + SOFTPLUS_D2 * tile_d_squares)
        w += tile_w
        d_sum += tile_d
        d_squares += tile_d_squares
        small_max = tl.maximum(small_max, largest)
    else:
        s, d, log_s = _weight(smaller(x, LARGEST))
        w += sum_keys(s)
        log_sum += sum_keys(s * log_s)
        d_sum += sum_keys(d)
        d_squares += sum_keys(d * d)
        d_max = tl.maximum(d_max, largest_key(d))
        saturated += sum_keys(tl.where(s > SATURATED, 1.0, 0.0))
    return m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated


@triton.jit
def sigmoid_sums(
    source, free, end, c, b, SATURATED: tl.constexpr,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Sums and number of keys, up to `end`; up to `free` none is excluded."""
    zeros = tl.zeros([BLOCK_ROWS, 4], tl.float32)
    m, small_max = zeros + EXCLUDED, zeros + EXCLUDED
    w, log_sum, d_sum, d_squares, d_max, saturated, num_keys = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for EXCLUDE in tl.static_range(2):
        for start in range(free if EXCLUDE else 0, end if EXCLUDE else free, BLOCK_KEYS):
            z = logits(
                source, start, EXCLUDE, HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST,
                BLOCK_ROWS, BLOCK_KEYS,
            )  # fmt: skip
            if EXCLUDE:
                num_keys += sum_keys(tl.where(z == EXCLUDED, 0.0, 1.0))
            m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated = _add(
                z, c, b, m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, SATURATED
            )
    num_keys = tl.sum(num_keys, 1) + free
    return m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, num_keys


@triton.jit
def sigmoid_row(c, b, m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, num_keys):
    """Joins the four threads' sums.

    Returns:
        Largest logit (in units of z), entropy, √Σd², Σ d, max d, Σ s and the share of saturated keys of each
        row [rows], with d = s(1 − s); and whether the entropy must come from `softmax_sums` instead.
    """
    m = tl.max(m, 1)
    w = tl.sum(w, 1)
    entropy = tl.log(w) - LN_2 * tl.sum(log_sum, 1) / w
    d_max = tl.maximum(tl.max(d_max, 1), _weight(tl.max(small_max, 1) * c + b)[1])
    return (
        tl.where(w != w, w, m),  # the maximum drops NaN, the sums do not
        entropy,
        tl.sqrt(tl.sum(d_squares, 1)),
        tl.sum(d_sum, 1),
        tl.where(w != w, w, d_max),
        w,
        tl.sum(saturated, 1) / tl.maximum(num_keys, 1.0),
        (entropy < DOMINATED) | (m * c + b < VANISHING),
    )
