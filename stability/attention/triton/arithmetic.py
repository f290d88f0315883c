"""Single instructions, where Triton's own functions add code for cases that do not arise here.

`tl.exp2` and `tl.log2` keep denormals with three more instructions each, and a division takes about eight.
Results that would be denormal are below 1e-38, and every argument of `reciprocal` and `log2` is at least 1.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter has no assembler.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def exp2(x):
    """2^x; below 2⁻¹²⁶ it is 0."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    """Log₂ x for x ≥ 1, to an absolute 2⁻²²."""
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """1/x for x ≥ 1; below 2⁻¹²⁶ it is 0."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log1p(x):
    """Ln(1 + x) for x ≥ 0, accurate in relative terms.

    Below 1/2 by 2 artanh v with v = x/(2 + x) ≤ 1/5, whose sixth term is 2e-10 of the first.
    """
    v = x / (2.0 + x)
    w = v * v
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w / 11))))
    return tl.where(x < 0.5, 2.0 * v * series, tl.log(1.0 + x))


@triton.jit
def larger(a, b):
    """Maximum, NaN if either is: one instruction, like the one that drops NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """Minimum, NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
