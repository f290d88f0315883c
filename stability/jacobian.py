"""Row Jacobians ∂weights/∂logits of both attention mechanisms, dense and as norms in closed form.

Softmax couples every key of a row with every other, J = diag(p) − p pᵀ; sigmoid leaves them alone,
J = diag(σ′). The norms need O(n) memory and follow from the sums in `stability.row_moments`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stability.html_table import html_table, spread_rows
from stability.row_moments import (
    NEGATIVE_INFINITY,
    SoftmaxRowMoments,
    below_second,
    sigmoid_derivative,
    softmax_row_moments,
    split_largest,
)

# Longest row whose 2ⁿ⁻¹ subsets are enumerated for ‖J‖_{∞→1}, and how many rows at a time (32 MiB of masses).
_MAX_ENUMERATED_KEYS = 12
_ENUMERATED_ROWS = 2048

# The worst rows that random and adversarial search found (2 to 20,000 keys, distances of 1e-16 to 1e4) start
# 2.9 % too high, then 1e-4, 3e-9, and at the third iteration float64 rounding. One to spare.
_SECULAR_ITERATIONS = 4


class JacobianNorms(NamedTuple):
    """Norms of row Jacobians; each field has the logits' shape without its last axis.

    Attributes:
        frobenius: ‖J‖_F.
        spectral: ‖J‖₂, the largest eigenvalue (J is symmetric and positive semidefinite).
        infinity: ‖J‖_∞, the largest absolute row sum.
        infinity_to_one: ‖J‖_{∞→1}; an upper bound where `infinity_to_one_is_exact` is False.
        trace: Trace J, which is also the nuclear norm.
        off_diagonal_share: Off-diagonal energy over ‖J‖_F², in [0, ½]; 0 where J is zero.
        infinity_to_one_is_exact: Boolean.

    Example:
        >>> norms = softmax_jacobian_norms(torch.tensor([0.0, 0.0]))  # two equal keys reach the bounds
        >>> norms.spectral.item(), norms.infinity.item(), norms.off_diagonal_share.item()
        (0.5, 0.5, 0.5)
    """

    frobenius: Tensor
    spectral: Tensor
    infinity: Tensor
    infinity_to_one: Tensor
    trace: Tensor
    off_diagonal_share: Tensor
    infinity_to_one_is_exact: Tensor

    def _repr_html_(self) -> str:
        rows = spread_rows(zip(self._fields[:-1], self[:-1], strict=True))
        exact = int(self.infinity_to_one_is_exact.sum())
        note = f"{exact} of {self.frobenius.numel()} rows have infinity_to_one exactly"
        return html_table(("norm", "smallest", "median", "largest"), rows) + f"<p>{note}</p>"


def softmax_jacobian(logits: Tensor) -> Tensor:
    """Dense Jacobian of softmax along the last axis.

    Formula: Jᵢⱼ = −pᵢpⱼ for i ≠ j and Jᵢᵢ = Σ_{j≠i} pᵢpⱼ, which is pᵢ(1 − pᵢ) without its cancellation.

    Args:
        logits: [..., n], floating point, finite. Half precisions are computed in float32.

    Returns:
        [..., n, n], symmetric; its rows sum to zero.

    Raises:
        TypeError: The logits are not a floating-point tensor.
        ValueError: There is no key, or a logit is not finite.

    Source: derived in docs/science.md.

    Example:
        >>> softmax_jacobian(torch.zeros(2))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    p = torch.softmax(_checked(logits), dim=-1)
    coupling = p.unsqueeze(-1) * p.unsqueeze(-2)
    off_diagonal = coupling - torch.diag_embed(coupling.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(off_diagonal.sum(dim=-1)) - off_diagonal


def sigmoid_jacobian(logits: Tensor) -> Tensor:
    """Dense Jacobian of the elementwise sigmoid: diag(σ′(z)).

    Args:
        logits: [..., n], floating point, finite, the bias already in them. Half precisions are computed
            in float32.

    Returns:
        [..., n, n], diagonal.

    Raises:
        TypeError: The logits are not a floating-point tensor.
        ValueError: There is no key, or a logit is not finite.

    Source: derived in docs/science.md.

    Example:
        >>> sigmoid_jacobian(torch.zeros(2))
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """
    return torch.diag_embed(sigmoid_derivative(_checked(logits)))


def softmax_jacobian_norms(logits: Tensor) -> JacobianNorms:
    """Norms of the softmax row Jacobian, in closed form and without cancellation.

    All are exact except ‖J‖_{∞→1} = max over subsets of 4m(1 − m), m the subset's mass: that is number
    partitioning. It is 4p₁(1 − p₁) where p₁ ≥ ½ and is enumerated for n ≤ 12; elsewhere the certified
    upper bound 1 is returned, `infinity_to_one_is_exact` is False, and the lower bound is 1 − p₁².

    Args:
        logits: [..., n], floating point, finite. Half precisions are computed in float32.

    Returns:
        Norms of shape [...].

    Raises:
        TypeError: The logits are not a floating-point tensor.
        ValueError: There is no key, or a logit is not finite.

    Source: ‖J‖_{∞→1} for p₁ ≥ ½: arXiv 2602.18849; the others: derived in docs/science.md.

    Example:
        >>> norms = softmax_jacobian_norms(torch.tensor([0.0, 0.0, -1e4], dtype=torch.float64))
        >>> f"{norms.spectral:.3f} {norms.frobenius:.3f} {norms.off_diagonal_share:.3f}"
        '0.500 0.500 0.500'
    """
    logits = _checked(logits)
    moments = softmax_row_moments(logits)
    infinity_to_one, is_exact = _infinity_to_one(logits, moments)
    return JacobianNorms(
        frobenius=moments.frobenius,
        spectral=softmax_row_spectral_norm(logits, moments),
        infinity=moments.infinity,
        infinity_to_one=infinity_to_one,
        trace=moments.trace,
        off_diagonal_share=moments.off_diagonal_share,
        infinity_to_one_is_exact=is_exact,
    )


def sigmoid_jacobian_norms(logits: Tensor) -> JacobianNorms:
    """Norms of the sigmoid row Jacobian diag(d), d = σ′(z); all are exact.

    Formula: ‖J‖₂ = ‖J‖_∞ = max d, ‖J‖_F = √Σd², ‖J‖_{∞→1} = trace J = Σd.

    Args:
        logits: [..., n], floating point, finite, the bias already in them. Half precisions are computed
            in float32.

    Returns:
        Norms of shape [...].

    Raises:
        TypeError: The logits are not a floating-point tensor.
        ValueError: There is no key, or a logit is not finite.

    Source: derived in docs/science.md.

    Example:
        >>> norms = sigmoid_jacobian_norms(torch.zeros(4))
        >>> f"{norms.spectral:.2f} {norms.frobenius:.2f} {norms.trace:.2f}"
        '0.25 0.50 1.00'
    """
    derivative = sigmoid_derivative(_checked(logits))
    largest = derivative.amax(dim=-1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))  # squares of 1e-200 would underflow
    frobenius = unit * torch.linalg.vector_norm(derivative / unit.unsqueeze(-1), dim=-1)
    trace = derivative.sum(dim=-1)
    return JacobianNorms(
        frobenius=frobenius,
        spectral=largest,
        infinity=largest,
        infinity_to_one=trace,
        trace=trace,
        off_diagonal_share=torch.zeros_like(largest),
        infinity_to_one_is_exact=torch.ones_like(largest, dtype=torch.bool),
    )


def softmax_spectral_norm(logits: Tensor) -> Tensor:
    """‖J‖₂ of the softmax row Jacobian: exact, without an eigendecomposition.

    Formula: the largest root λ of 1 = Σ pᵢ²/(pᵢ − λ); see `softmax_row_spectral_norm`.

    Args:
        logits: [..., n], floating point, finite. Half precisions are computed in float32.

    Returns:
        Spectral norms of shape [...], in [0, 1/2].

    Raises:
        TypeError: The logits are not a floating-point tensor.
        ValueError: There is no key, or a logit is not finite.

    Source: derived in docs/science.md.

    Example:
        >>> softmax_spectral_norm(torch.zeros(2, 4, dtype=torch.float64))
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    logits = _checked(logits)
    return softmax_row_spectral_norm(logits, softmax_row_moments(logits))


def softmax_row_spectral_norm(logits: Tensor, moments: SoftmaxRowMoments) -> Tensor:
    """`softmax_spectral_norm` for rows whose moments are known; unchecked, and never waits for the device.

    With λ = p₂(1 + x) and rᵢ = pᵢ/p₂ the secular equation of diag(p) − p pᵀ reads

        (x + 1 − p₁t₁)/(p₁ − p₂ − p₂x) = ψ(x),   ψ(x) = Σ_{i≥2} rᵢ²/(x + 1 − rᵢ).

    ψ is concave in 1/x, so its tangent c + s/x lies above it, and solving the quadratic that the tangent
    leaves gives a sequence that falls to the root, quadratically in the end. Stopping early would leave an
    upper bound.

    Args:
        logits: [..., n], float32 or float64, n ≥ 1. −inf marks an excluded key; a row may be all −inf.
        moments: `softmax_row_moments(logits)`.

    Returns:
        Spectral norms of shape [...]; 0 for rows of fewer than two keys.

    Source: Bunch, Nielsen & Sorensen 1978, "Rank-one modification of the symmetric eigenproblem", §3, in
    units of p₂; derived in docs/science.md.
    """
    max_logit, second, rest = split_largest(logits)
    log_ratio = below_second(rest, second)
    distance = log_ratio.expm1().neg()  # 1 − rᵢ, exact where rᵢ is nearly 1
    ratio_squared = torch.exp(2 * log_ratio)
    p1, p2 = moments.p1, moments.p2
    gap = torch.where(second > NEGATIVE_INFINITY, p1 * torch.expm1(second - max_logit).neg(), p1)  # p₁ − p₂
    slope = 1 - p1 * moments.t1
    smallest = torch.finfo(logits.dtype).tiny  # x = 0 where p₁ = p₂, and 0/0 must not arise there

    c, s = torch.zeros_like(p1), moments.t2  # the tangent at x = ∞
    x = _secular_step(p2, gap, slope, c, s)
    for _ in range(_SECULAR_ITERATIONS):
        shift = x.clamp_min(smallest).unsqueeze(-1)
        inverse = 1 / (shift + distance)
        c = (ratio_squared * inverse * (distance * inverse)).sum(dim=-1)
        s = (ratio_squared * (shift * inverse).square()).sum(dim=-1)
        x = _secular_step(p2, gap, slope, c, s)
    return p2 * (1 + x)


def _secular_step(p2: Tensor, gap: Tensor, slope: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Root x ≥ 0 of x(x + slope) = (gap − p₂x)(cx + s)."""
    a = 1 + p2 * c
    b = slope - gap * c + p2 * s
    root = (b.square() + 4 * a * gap * s).sqrt()
    half = b.abs() + root  # no cancellation in either sign of b
    half = torch.where(half > 0, half, torch.ones_like(half))
    return torch.where(b > 0, 2 * gap * s / half, half / (2 * a))


def _infinity_to_one(logits: Tensor, moments: SoftmaxRowMoments) -> tuple[Tensor, Tensor]:
    """‖J‖_{∞→1} or its upper bound 1, and whether it is exact."""
    has_majority = moments.complement <= moments.p1  # p₁ ≥ ½, and true for a tie of two whatever p₁ rounds to
    if logits.shape[-1] <= _MAX_ENUMERATED_KEYS:
        rows = torch.softmax(logits, dim=-1).reshape(-1, logits.shape[-1])
        split = torch.cat([_largest_split(chunk) for chunk in rows.split(_ENUMERATED_ROWS)])
        otherwise, is_exact = split.reshape(has_majority.shape), torch.ones_like(has_majority)
    else:
        otherwise, is_exact = torch.ones_like(moments.p1), has_majority
    return torch.where(has_majority, 4 * moments.derivative_max, otherwise), is_exact


def _largest_split(p: Tensor) -> Tensor:
    """Maximum over subsets of 4m(1 − m) for rows [rows, n]; the last key stays out, by symmetry."""
    num_keys = p.shape[-1]
    subsets = torch.arange(2 ** (num_keys - 1), device=p.device)
    member = (subsets.unsqueeze(-1) >> torch.arange(num_keys, device=p.device)) & 1
    member = member.to(p.dtype)
    return (4 * (p @ member.T) * (p @ (1 - member).T)).amax(dim=-1)


def _checked(logits: Tensor) -> Tensor:
    """The logits in float32 or float64, or an error that names what is wrong with them."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"`logits` must be a floating-point tensor; got {got}. Convert with logits.float().")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"`logits` must have shape [..., n] with n ≥ 1 keys; got {tuple(logits.shape)}.")
    if not torch.isfinite(logits).all():
        raise ValueError(
            "`logits` must be finite; got NaN or infinity. Drop excluded keys instead of masking them."
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
