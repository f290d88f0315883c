"""The bounds under test, and the searches that try to break them.

A bound is checked in three ways that are never mixed: *mathematics* (float64, far finer than the inputs),
*native* precision (what training computes, every operation rounded to the dtype) and exact rational
intervals, which cover the real numbers between the floating-point ones. All concern the row Jacobian
∂weights/∂logits; none bounds a whole attention layer (docs/science.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stability.adversarial_rows import climb, extreme_rows
from stability.html_table import html_table
from stability.jacobian import softmax_jacobian, softmax_jacobian_norms
from stability.row_moments import sigmoid_derivative

SIGMOID_DERIVATIVE_BOUND = 1 / 4
"""Largest derivative of the sigmoid, reached at 0: the bound of a sigmoid row Jacobian's entries."""
SOFTMAX_JACOBIAN_ENTRY_BOUND = 1 / 4
"""Largest entry of a softmax row Jacobian, reached by a key of weight ½."""
SOFTMAX_JACOBIAN_SPECTRAL_BOUND = 1 / 2
"""Largest spectral norm of a softmax row Jacobian, reached by two equal keys."""
SOFTMAX_JACOBIAN_INFINITY_BOUND = 1 / 2
"""Largest absolute row sum of a softmax row Jacobian."""

_FOUR_ULP_FLOAT64 = 4 * torch.finfo(torch.float64).eps  # relative to a power of two

Arithmetic = Literal["mathematics", "native"]

_BIT_PATTERNS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
# On a CPU a chunk's float64 temporaries (256 KiB each) should stay in the cache; a GPU wants few launches.
_CPU_CHUNK, _GPU_CHUNK = 2**15, 2**24


@dataclass(frozen=True)
class BoundCheck:
    """Outcome of one search for a value above a bound.

    Attributes:
        quantity: What was bounded, and in which arithmetic.
        bound: The claimed upper bound of the magnitude.
        maximum: Largest magnitude seen; NaN if the arithmetic produced one.
        argmax: Input of that value, the one of smallest magnitude among ties; a tuple for a row of logits.
        checked: Number of inputs (of intervals, for interval arithmetic).
        violations: Number of them with a magnitude > bound + tolerance, or NaN.
        tolerance: Rounding that was allowed.

    Example:
        >>> check = verify_sigmoid_derivative_bound(dtype=torch.bfloat16)
        >>> check.maximum, check.argmax, check.checked, check.violations, check.holds
        (0.25, 0.0, 65280, 0, True)
    """

    quantity: str
    bound: float
    maximum: float
    argmax: float | tuple[float, ...]
    checked: int
    violations: int
    tolerance: float = 0.0

    @property
    def excess(self) -> float:
        """Maximum − bound, whatever the tolerance; negative where the bound was not reached."""
        return self.maximum - self.bound

    @property
    def holds(self) -> bool:
        """Something was checked and nothing broke the bound."""
        return self.checked > 0 and self.violations == 0

    def _repr_html_(self) -> str:
        return _html([self])


class SoftmaxBoundChecks(NamedTuple):
    """Checks of the softmax row Jacobian: largest entry, spectral norm, largest absolute row sum."""

    entry: BoundCheck
    spectral: BoundCheck
    infinity: BoundCheck

    def _repr_html_(self) -> str:
        return _html(self)


def _html(checks: Iterable[BoundCheck]) -> str:
    rows = [
        [
            check.quantity,
            "holds" if check.holds else f"{check.violations} violations",
            f"{check.bound:g}",
            f"{check.maximum:.9g}",
            f"{check.checked:,}",
        ]
        for check in checks
    ]
    return html_table(("quantity", "bound", "at most", "largest seen", "inputs checked"), rows)


def num_finite_values(dtype: torch.dtype) -> int:
    """How many bit patterns of float16, bfloat16 or float32 are finite numbers, both zeros included.

    Args:
        dtype: The floating-point type.

    Returns:
        The count, which is also what `verify_sigmoid_derivative_bound` checks.

    Raises:
        ValueError: The dtype is too wide to enumerate, or no floating-point type.

    Source: IEEE 754: the patterns of either sign are ordered like the magnitudes they stand for.

    Example:
        >>> [num_finite_values(t) for t in (torch.float16, torch.bfloat16, torch.float32)]
        [63488, 65280, 4278190080]
    """
    if dtype not in _BIT_PATTERNS:
        raise ValueError(
            f"`dtype` must be float16, bfloat16 or float32, which can be enumerated; got {dtype}."
        )
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(_BIT_PATTERNS[dtype])
    return 2 * (int(largest) + 1)


@torch.no_grad()
def verify_sigmoid_derivative_bound(
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    arithmetic: Arithmetic = "mathematics",
    tolerance: float = _FOUR_ULP_FLOAT64 * SIGMOID_DERIVATIVE_BOUND,
    progress: Callable[[int], object] | None = None,
) -> BoundCheck:
    """Check σ′(x) ≤ 1/4 at every finite value of a dtype.

    Args:
        dtype: float16, bfloat16 (both instantly) or float32 (4.3 billion values, about half a minute on a
            CPU core).
        device: Where to evaluate.
        arithmetic: "mathematics": σ′ evaluated in float64 by `sigmoid_derivative`. "native":
            `torch.sigmoid(x) * (1 - torch.sigmoid(x))` with every operation rounded to `dtype`, as
            autograd's kernel does (for half precisions that kernel rounds only its result).
        tolerance: Excess put down to rounding; by default 4 ulp of float64, far below the ulp of `dtype`.
        progress: Called with the number of values just checked; `num_finite_values(dtype)` is the total.

    Returns:
        The check. A broken bound is a result, not an exception.

    Raises:
        ValueError: The dtype cannot be enumerated, or the arithmetic is unknown.

    Source: the claim is that of arXiv 2604.27124 (abstract); the enumeration is described in docs/science.md.

    Example:
        >>> check = verify_sigmoid_derivative_bound(torch.float16)
        >>> check.checked, check.maximum, check.argmax, check.holds
        (63488, 0.25, 0.0, True)
    """
    num_magnitudes = num_finite_values(dtype) // 2
    if arithmetic not in ("mathematics", "native"):
        raise ValueError(f'`arithmetic` must be "mathematics" or "native"; got {arithmetic!r}.')
    device = torch.device(device)
    chunk = min(num_magnitudes, _CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK)
    integer = _BIT_PATTERNS[dtype]
    offsets = torch.arange(chunk, dtype=integer, device=device)
    patterns = torch.empty_like(offsets)
    wide = torch.empty(chunk, dtype=torch.float64, device=device) if arithmetic == "mathematics" else None
    search = _Search(f"σ′(x), every finite {_name(dtype)}, {arithmetic}", SIGMOID_DERIVATIVE_BOUND, tolerance)
    for start in range(0, num_magnitudes, chunk):
        size = min(chunk, num_magnitudes - start)
        for sign_bit in (0, torch.iinfo(integer).min):  # both signs of a magnitude before the next one
            torch.add(offsets, start + sign_bit, out=patterns)
            values = patterns[:size].view(dtype)
            if wide is None:
                weight = torch.sigmoid(values)
                search.add((1 - weight).mul_(weight), values)
            else:
                search.add(sigmoid_derivative(wide[:size].copy_(values)), values)
            if progress is not None:
                progress(size)
    return search.result()


def verify_sigmoid_derivative_bound_on_reals() -> BoundCheck:
    """Prove σ′(z) ≤ 1/4 for every real z with exact rational intervals; nothing is rounded.

    Formula: σ′ = s(1 − s) = 1/4 − (s − 1/2)² with s = σ(z) ∈ [0, 1], so s − 1/2 ∈ [−1/2, 1/2], its square
    lies in [0, 1/4], and σ′ in [0, 1/4]. The identity is one of quadratics: it holds for every s because it
    holds at three. (Interval arithmetic on s(1 − s) itself only gives σ′ ≤ 1.)

    Returns:
        The check, of one interval; `argmax` is the z with σ(z) = 1/2.

    Source: derived in docs/science.md.

    Example:
        >>> verify_sigmoid_derivative_bound_on_reals().maximum
        0.25
    """
    zero, half, one = Fraction(0), Fraction(1, 2), Fraction(1)
    is_identity = all(_product_form(s) == half**2 - (s - half) ** 2 for s in (zero, half, one))
    low, high = zero - half, one - half
    squares = sorted((low * low, high * high))
    smallest_square = zero if low <= 0 <= high else squares[0]
    enclosure = (half**2 - squares[1], half**2 - smallest_square)
    bound = Fraction(SIGMOID_DERIVATIVE_BOUND)
    proven = is_identity and -bound <= enclosure[0] and enclosure[1] <= bound
    return BoundCheck(
        quantity="σ′(z), every real z, exact intervals",
        bound=SIGMOID_DERIVATIVE_BOUND,
        maximum=float(enclosure[1]) if is_identity else math.nan,
        argmax=0.0,
        checked=1,
        violations=0 if proven else 1,
    )


@torch.no_grad()
def verify_softmax_jacobian_bounds(
    *,
    num_keys: Sequence[int] = (1, 2, 3, 5, 16, 63),
    num_rows: int = 256,
    num_climbing_steps: int = 200,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> SoftmaxBoundChecks:
    """Search for softmax rows whose Jacobian has an entry above 1/4, or a spectral or ∞-norm above 1/2.

    Three searches for each row length: extreme logits (ties, gaps from the smallest subnormal upwards, ± the
    largest finite number), Gaussian logits of scales 1e-3 to 1e4, and hill climbing on the spectral norm. The
    bounds are attained at p = (½, ½, 0, …), so rounding may pass them: 4 ulp are tolerated and
    `BoundCheck.excess` reports how many were used.

    Args:
        num_keys: Row lengths, each at least 1.
        num_rows: Random rows, and climbers, for each length.
        num_climbing_steps: Proposals made to each climber.
        dtype: float32 or float64.
        device: Where to evaluate.
        seed: Of the search's own generator.

    Returns:
        One check for each quantity. A broken bound is a result, not an exception.

    Raises:
        ValueError: A row length or count is below 1, or the dtype is another.

    Source: the bounds are derived in docs/science.md.

    Example:
        >>> checks = verify_softmax_jacobian_bounds(num_keys=(2, 3), num_rows=8, num_climbing_steps=1)
        >>> checks.spectral.maximum, checks.spectral.argmax, checks.spectral.holds
        (0.5, (0.0, 0.0), True)
    """
    if not num_keys or min(num_keys) < 1 or num_rows < 1 or num_climbing_steps < 0:
        raise ValueError(
            "`num_keys` and `num_rows` must be at least 1 and `num_climbing_steps` at least 0; "
            f"got {tuple(num_keys)}, {num_rows} and {num_climbing_steps}."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be float32 or float64; got {dtype}.")
    generator = torch.Generator(device=device).manual_seed(seed)
    four_ulp = 4 * torch.finfo(dtype).eps
    name = f"softmax rows, {_name(dtype)}"
    entry = _Search(
        f"max |∂pᵢ/∂zⱼ|, {name}", SOFTMAX_JACOBIAN_ENTRY_BOUND, four_ulp * SOFTMAX_JACOBIAN_ENTRY_BOUND
    )
    spectral = _Search(
        f"‖J‖₂, {name}", SOFTMAX_JACOBIAN_SPECTRAL_BOUND, four_ulp * SOFTMAX_JACOBIAN_SPECTRAL_BOUND
    )
    infinity = _Search(
        f"‖J‖_∞, {name}", SOFTMAX_JACOBIAN_INFINITY_BOUND, four_ulp * SOFTMAX_JACOBIAN_INFINITY_BOUND
    )
    for n in sorted(num_keys):
        random = torch.randn(num_rows, n, dtype=dtype, device=device, generator=generator)
        random *= torch.logspace(-3, 4, num_rows, dtype=dtype, device=device).unsqueeze(-1)
        climbed = climb(random.clamp(-10, 10), num_climbing_steps, generator)
        for rows in (extreme_rows(n, dtype, device), random, climbed):
            norms = softmax_jacobian_norms(rows)
            entry.add(softmax_jacobian(rows).abs().amax(dim=(-2, -1)), rows)
            spectral.add(norms.spectral, rows)
            infinity.add(norms.infinity, rows)
    return SoftmaxBoundChecks(entry.result(), spectral.result(), infinity.result())


class _Search:
    """Running maximum of |values|. Candidates come in order of magnitude: the first of equals is kept."""

    def __init__(self, quantity: str, bound: float, tolerance: float) -> None:
        self._quantity, self._bound, self._tolerance = quantity, bound, tolerance
        self._maximum, self._argmax = -math.inf, torch.empty(0)
        self._checked = self._violations = 0

    def add(self, values: Tensor, inputs: Tensor) -> None:
        """Look at values [m] and the inputs [m] or [m, n] they belong to."""
        self._checked += values.shape[0]
        low, high = torch.aminmax(values)
        maximum = torch.maximum(-low, high).item()
        # Most chunks end here, after a single pass; `not ≤` is also true of NaN.
        if not maximum <= self._bound + self._tolerance:
            self._violations += int((~(values.abs() <= self._bound + self._tolerance)).sum())
        if not (maximum <= self._maximum or math.isnan(self._maximum)):
            self._maximum, self._argmax = maximum, inputs[values.abs().argmax()].clone()

    def result(self) -> BoundCheck:
        """What was found."""
        argmax = self._argmax.tolist()
        return BoundCheck(
            quantity=self._quantity,
            bound=self._bound,
            maximum=self._maximum,
            argmax=tuple(argmax) if isinstance(argmax, list) else argmax,
            checked=self._checked,
            violations=self._violations,
            tolerance=self._tolerance,
        )


def _product_form(s: Fraction) -> Fraction:
    return s * (1 - s)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
