"""Norms of one softmax row's Jacobian in mpmath, straight from the definitions and with 60 digits.

Sums run over pairs of keys (1 − pᵢ = Σ_{j≠i} pⱼ), so no digits cancel however collapsed the row is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mpmath
from mpmath import mpf

DIGITS = 60


def softmax(logits: Sequence[float]) -> list[mpf]:
    with mpmath.workdps(DIGITS):
        largest = max(logits)
        powers = [mpmath.exp(mpf(z) - mpf(largest)) for z in logits]
        total = mpmath.fsum(powers)
        return [power / total for power in powers]


def complements(p: Sequence[mpf]) -> list[mpf]:
    """1 − pᵢ for every key."""
    return [mpmath.fsum(p[:i]) + mpmath.fsum(p[i + 1 :]) for i in range(len(p))]


def softmax_norms(logits: Sequence[float]) -> dict[str, mpf]:
    """Every field of `JacobianNorms` but ‖J‖_{∞→1}."""
    with mpmath.workdps(DIGITS):
        p = softmax(logits)
        own = [a * b for a, b in zip(p, complements(p), strict=True)]
        diagonal = mpmath.fsum(d**2 for d in own)
        off_diagonal = 2 * mpmath.fsum((a * b) ** 2 for a, b in itertools.combinations(p, 2))
        energy = diagonal + off_diagonal
        return {
            "frobenius": mpmath.sqrt(energy),
            "spectral": spectral_norm(p),
            "infinity": 2 * max(own),
            "trace": mpmath.fsum(own),
            "off_diagonal_share": off_diagonal / energy if energy else mpf(0),
        }


def spectral_norm(p: Sequence[mpf]) -> mpf:
    """Largest root of the secular equation by bisection, 200 halvings."""
    if len(p) == 1:
        return mpf(0)
    first, second, *_ = ordered = sorted(p, reverse=True)
    if first == second:
        return first
    own = first * mpmath.fsum(ordered[1:])
    low, high = max(second, own), min(first, 2 * own)
    for _ in range(200):
        middle = (low + high) / 2
        # (λ − p₁(1 − p₁))/(p₁ − λ) = p₁²/(p₁ − λ) − 1
        value = (middle - own) / (first - middle) - mpmath.fsum(q**2 / (middle - q) for q in ordered[1:])
        low, high = (middle, high) if value < 0 else (low, middle)
    return high


def eigenvalue(logits: Sequence[float]) -> mpf:
    """Largest eigenvalue of diag(p) − p pᵀ by a dense solver; slow, for a few keys."""
    with mpmath.workdps(DIGITS):
        p = softmax(logits)
        matrix = mpmath.diag(p) - mpmath.matrix(p) * mpmath.matrix(p).T
        return max(mpmath.eigsy(matrix, eigvals_only=True))


def infinity_to_one(logits: Sequence[float]) -> mpf:
    """max ‖Jx‖₁ over x ∈ {−1, 1}ⁿ, by enumeration of the definition."""
    with mpmath.workdps(DIGITS):
        p = softmax(logits)
        signs = itertools.product((-1, 1), repeat=len(p))
        return max(_one_norm_of_image(p, x) for x in signs)


def _one_norm_of_image(p: Sequence[mpf], x: Sequence[int]) -> mpf:
    # (Jx)ᵢ = pᵢ Σⱼ pⱼ(xᵢ − xⱼ)
    return mpmath.fsum(
        a * abs(mpmath.fsum(b * (s - t) for b, t in zip(p, x, strict=True)))
        for a, s in zip(p, x, strict=True)
    )
