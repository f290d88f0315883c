"""What one attention row is reduced to: a few sums from which every row-Jacobian norm follows.

Softmax, with p₁ ≥ p₂ ≥ … the probabilities of a row and rᵢ = pᵢ/p₂ for every key but the largest:

    δ = 1 − p₁ = p₂ t₁,   tₖ = Σ_{i≥2} rᵢᵏ   (1 ≤ tₖ ≤ n − 1)

    ‖J‖_F²   = p₂² [p₁²(t₁² + t₂) + t₂(1 + S₂) − 2 p₂ t₃],   S₂ = p₁² + p₂² t₂
    trace J  = p₂ [t₁(1 + p₁) − p₂ t₂]
    off-diagonal energy = p₂² [2 p₁² t₂ + p₂²(t₂² − t₄)]

The textbook form S₂ − 2S₃ + S₂² subtracts numbers near 1 and returns 0 at p₁ = 1 − 1e-9, exactly in the
entropy collapse one wants to see. Keeping the largest probability out of the sums cures that, and taking
the second largest as their unit keeps ratios exact where p₂ itself underflows (logits ±1e4).

A streaming kernel needs the same numbers and one pass over the keys. Derivation: docs/science.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, eq=False)
class SoftmaxRowMoments:
    """Sums over one row of softmax logits; each field has the logits' shape without its last axis.

    Attributes:
        max_logit: Largest logit m; −inf for a row without a key.
        log_sum_exp: Logarithm of the softmax denominator.
        entropy: −Σ p ln p in nats.
        p1: Largest probability.
        p2: Second largest probability, 0 where there is no second key or it underflows.
        t1: Σ pᵢ/p₂ over every key but the largest, 0 where there is no second key.
        t2: The same with squares.
        t3: The same with cubes.
        t4: The same with fourth powers.
    """

    max_logit: Tensor
    log_sum_exp: Tensor
    entropy: Tensor
    p1: Tensor
    p2: Tensor
    t1: Tensor
    t2: Tensor
    t3: Tensor
    t4: Tensor

    @cached_property
    def complement(self) -> Tensor:
        """δ = 1 − p₁, without cancellation."""
        return self.p2 * self.t1

    @cached_property
    def trace(self) -> Tensor:
        """Trace J = 1 − S₂, which is also the nuclear norm."""
        return self.p2 * (self.t1 * (1 + self.p1) - self.p2 * self.t2)

    @cached_property
    def frobenius(self) -> Tensor:
        """‖J‖_F; at most 1/2."""
        return self.p2 * self._energy.sqrt()

    @cached_property
    def off_diagonal_share(self) -> Tensor:
        """Off-diagonal energy over ‖J‖_F², in [0, ½]; 0 where J is zero."""
        off_diagonal = 2 * self._p1_squared * self.t2 + self._p2_squared * (self.t2 * self.t2 - self.t4)
        return (off_diagonal / self._energy).masked_fill_(self.t2 == 0, 0.0)

    @cached_property
    def derivative_max(self) -> Tensor:
        """p₁(1 − p₁), the largest probability's own derivative; at most 1/4."""
        return self.p1 * self.complement

    @cached_property
    def infinity(self) -> Tensor:
        """‖J‖_∞ = 2 p₁(1 − p₁), which is the maximum of 2p(1 − p) over the row; at most 1/2."""
        return 2 * self.derivative_max

    @cached_property
    def spectral_upper_bound(self) -> Tensor:
        """min(‖J‖_F, trace J, ‖J‖_∞) ≥ ‖J‖₂."""
        return torch.minimum(torch.minimum(self.frobenius, self.trace), self.infinity)

    @cached_property
    def _p1_squared(self) -> Tensor:
        return self.p1 * self.p1

    @cached_property
    def _p2_squared(self) -> Tensor:
        return self.p2 * self.p2

    @cached_property
    def _energy(self) -> Tensor:
        """‖J‖_F² / p₂²."""
        s2 = self._p1_squared + self._p2_squared * self.t2
        return self._p1_squared * (self.t1 * self.t1 + self.t2) + self.t2 * (1 + s2) - 2 * self.p2 * self.t3


def softmax_row_moments(logits: Tensor) -> SoftmaxRowMoments:
    """Moments of softmax rows, accurate in relative terms down to fully collapsed rows.

    Args:
        logits: [..., n], floating point, n ≥ 1. −inf marks an excluded key; a row may be all −inf.

    Returns:
        Moments of shape [...] in the logits' dtype.
    """
    moments, ratio = _below_largest(logits)
    squared = ratio * ratio
    return SoftmaxRowMoments(
        *moments, squared.sum(dim=-1), (squared * ratio).sum(dim=-1), (squared * squared).sum(dim=-1)
    )


def softmax_row_entropy(logits: Tensor) -> Tensor:
    """`softmax_row_moments(logits).entropy` without the moments that are not needed for it."""
    (_, _, entropy, *_), _ = _below_largest(logits)
    return entropy


def _below_largest(logits: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The first six fields of `SoftmaxRowMoments`, and rᵢ [..., n], which is 0 for the largest."""
    max_logit, second, rest = split_largest(logits)
    has_second = second > NEGATIVE_INFINITY
    ratio = below_second(rest, second).exp_()  # rᵢ; 0 for excluded keys and for the largest
    t1 = ratio.sum(dim=-1)
    has_key = max_logit != NEGATIVE_INFINITY  # true of NaN, which is to come out as NaN
    gap = torch.where(has_second, second - torch.where(has_key, max_logit, second), second)  # ≤ 0
    relative = torch.exp(gap) * t1  # R = Σ_{i≥2} exp(zᵢ − m)
    log_denominator = torch.log1p(relative)
    p1 = torch.where(has_key, torch.exp(-log_denominator), torch.zeros_like(max_logit))
    p2 = torch.exp(gap) * p1
    # Σ pᵢ (m − zᵢ). An excluded key has p = 0 and an infinite distance, one masked by the most negative
    # number a distance that overflows in the sum; both count as 0.
    weighted = p2.unsqueeze(-1) * ratio
    distance = (max_logit.unsqueeze(-1) - rest).masked_fill_(weighted == 0, 0.0)
    entropy = log_denominator + (weighted * distance).sum(dim=-1)
    return (max_logit, max_logit + log_denominator, entropy, p1, p2, t1), ratio


def split_largest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and second largest logit [...] of each row, and the row [..., n] with −inf for its largest."""
    max_logit, largest = logits.max(dim=-1)
    rest = logits.scatter(-1, largest.unsqueeze(-1), NEGATIVE_INFINITY)
    return max_logit, rest.amax(dim=-1), rest


def below_second(rest: Tensor, second: Tensor) -> Tensor:
    """Ln rᵢ = zᵢ − z₂ of a row without its largest; −inf throughout where there is no second key."""
    anchor = torch.where(second > NEGATIVE_INFINITY, second, torch.zeros_like(second))
    return rest - anchor.unsqueeze(-1)


def sigmoid_derivative(logits: Tensor) -> Tensor:
    """σ′(z) = σ(z)(1 − σ(z)), accurate in relative terms on both tails.

    Formula: w(1 − w) with w = e/(1 + e) and e = exp(−|z|). In this form rounding never passes 1/4, and as
    w ≤ 1/2 nothing cancels. Source: derived in docs/science.md.

    Args:
        logits: Any shape, floating point; the bias is already in it.

    Returns:
        Derivatives of the same shape and dtype, in [0, 1/4].

    Example:
        >>> sigmoid_derivative(torch.tensor([0.0, 100.0, -100.0], dtype=torch.float64))
        tensor([2.5000e-01, 3.7201e-44, 3.7201e-44], dtype=torch.float64)
    """
    decay = torch.exp(-logits.abs())
    weight = decay / (1 + decay)
    return weight * (1 - weight)
