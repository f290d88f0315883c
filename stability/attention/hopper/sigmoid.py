"""The logistic function at one MUFU per element, as the Hopper kernels evaluate it.

σ(x) = 1/(1 + e⁻ˣ) needs two results of the special function unit, exp2 and reciprocal, and that unit gives one
per 8 issue slots: at head_dim 64 as many clocks as the tensor cores need for the whole element. Two shortcuts
need one, each accurate on one side:

    low   every x ≤ −3.3:   e = eˣ is small, σ = e/(1 + e) ≈ e − ce². One fused multiply-add.
    high  every x ≥ −5:     ½ + ½ tanh(x/2) by tanh.approx; lower down its absolute error of 1e-6 shows.
    mixed                   both kinds: exp2 and reciprocal.

A warp picks the case for 32 elements of each of its threads at a time: sigmoid attention at its default bias
−ln n lives in `low`, at bias 0 in `high`. Comparing costs half a slot an element: logits below zero, read as
unsigned integers, order backwards, and Hopper takes the smallest of three integers in one instruction.

c = 0.97035 bounds the relative error of e − ce² by 2.3e-4 over `low`; it vanishes as x → −∞, so what sigmoid
attention sums up is exact to float32. Scaled by c the same polynomial needs no constant: with ẽ = ceˣ,
cσ = ẽ − ẽ². The kernels therefore compute cσ and divide their results by c.

The fast mode is ½ + ½ tanh(x/2) everywhere: relative error 1e-4 for x > −6, 1e-2 at −9, 1 at −16.
"""

import math
import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ACCURATE = gl.constexpr(0)
FAST = gl.constexpr(1)

LOW_BELOW = -3.3
HIGH_ABOVE = -5.0
CURVATURE = 0.97035

LOG2_E = math.log2(math.e)
_OFFSET = math.log2(CURVATURE)

_LOG2_E = gl.constexpr(LOG2_E)
_LOG2_CURVATURE = gl.constexpr(_OFFSET)
_CURVATURE = gl.constexpr(CURVATURE)


def _bits(value: float) -> str:
    """The float32 nearest to ``value`` as a PTX integer literal."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _float(value: float) -> str:
    """The float32 nearest to ``value`` as a PTX floating-point literal."""
    return "0f" + _bits(value)[2:]


def _extreme(instruction: str, operands: list[str], chains: int = 4) -> str:
    """Reduces ``operands`` to m0 with min.u32 or max.u32; some chains side by side hide the latency."""
    lines = []
    for chain in range(chains):
        mine = operands[chain::chains]
        lines.append(f"mov.b32 m{chain}, {mine[0]};")
        for operand in mine[1:]:
            lines.append(f"mov.b32 n, {operand}; {instruction} m{chain}, m{chain}, n;")
    lines += [f"{instruction} m0, m0, m{chain};" for chain in range(1, chains)]
    return "\n".join(lines)


def _cases(inputs: list[str], low: list[str], high: list[str], mixed: list[str]) -> str:
    """PTX that runs the case in which a warp's ``inputs`` fall; the votes keep every branch uniform."""
    newline = "\n"
    return f"""{{
    .reg .pred c; .reg .b32 m<4>; .reg .b32 n; .reg .f32 e, t;
    {_extreme("min.u32", inputs)}
    setp.ge.u32 c, m0, {_bits(LOW_BELOW * LOG2_E + _OFFSET)};
    vote.sync.all.pred c, c, 0xffffffff;
    @c bra.uni LOW;
    {_extreme("max.u32", inputs)}
    setp.le.u32 c, m0, {_bits(HIGH_ABOVE * LOG2_E + _OFFSET)};
    vote.sync.all.pred c, c, 0xffffffff;
    @c bra.uni HIGH;
    {newline.join(mixed)}
    bra.uni DONE;
    HIGH:
    {newline.join(high)}
    bra.uni DONE;
    LOW:
    {newline.join(low)}
    DONE:
    }}"""


def _accurate(elements: int) -> str:
    """PTX for cσ of ``elements`` logits w = log₂(ceˣ): outputs $0…, inputs after them."""
    outputs = [f"${i}" for i in range(elements)]
    inputs = [f"${elements + i}" for i in range(elements)]
    low = [
        f"ex2.approx.ftz.f32 e, {w}; neg.f32 t, e; fma.rn.ftz.f32 {p}, t, e, e;"
        for p, w in zip(outputs, inputs, strict=True)
    ]
    half_ln2 = math.log(2) / 2
    high = [
        f"fma.rn.ftz.f32 t, {w}, {_float(half_ln2)}, {_float(-_OFFSET * half_ln2)}; tanh.approx.f32 t, t; "
        f"fma.rn.ftz.f32 {p}, t, {_float(CURVATURE / 2)}, {_float(CURVATURE / 2)};"
        for p, w in zip(outputs, inputs, strict=True)
    ]
    mixed = [
        f"neg.f32 t, {w}; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, {_float(1 / CURVATURE)}; "
        f"rcp.approx.ftz.f32 {p}, t;"
        for p, w in zip(outputs, inputs, strict=True)
    ]
    return _cases(inputs, low, high, mixed)


def _accurate_with_slope(elements: int) -> str:
    """PTX for cσ (outputs $0…) and cσ(1 − σ) (the next) of ``elements`` logits w = log₂(ceˣ)."""
    weights = [f"${i}" for i in range(elements)]
    slopes = [f"${elements + i}" for i in range(elements)]
    inputs = [f"${2 * elements + i}" for i in range(elements)]
    half_ln2 = math.log(2) / 2
    triples = list(zip(weights, slopes, inputs, strict=True))
    low = [
        f"ex2.approx.ftz.f32 e, {w}; neg.f32 t, e; fma.rn.ftz.f32 e, t, e, e; mov.f32 {p}, e; "
        f"fma.rn.ftz.f32 {slope}, t, e, e;"
        for p, slope, w in triples
    ]
    high = [
        f"fma.rn.ftz.f32 t, {w}, {_float(half_ln2)}, {_float(-_OFFSET * half_ln2)}; tanh.approx.f32 t, t; "
        f"fma.rn.ftz.f32 {p}, t, {_float(CURVATURE / 2)}, {_float(CURVATURE / 2)}; mul.ftz.f32 t, t, t; "
        f"fma.rn.ftz.f32 {slope}, t, {_float(-CURVATURE / 4)}, {_float(CURVATURE / 4)};"
        for p, slope, w in triples
    ]
    mixed = [
        f"neg.f32 t, {w}; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, {_float(1 / CURVATURE)}; "
        f"rcp.approx.ftz.f32 e, t; mov.f32 {p}, e; mul.ftz.f32 t, e, {_float(-1 / CURVATURE)}; "
        f"fma.rn.ftz.f32 {slope}, t, e, e;"
        for p, slope, w in triples
    ]
    return _cases(inputs, low, high, mixed)


def _constraints(elements: int, results: int = 1) -> str:
    return ",".join(["=&f"] * (elements * results) + ["f"] * elements)


GROUP = gl.constexpr(32)
_ACCURATE_ASM = gl.constexpr(_accurate(32))
_ACCURATE_CONSTRAINTS = gl.constexpr(_constraints(32))
_FAST_SLOPE_ASM = gl.constexpr(
    "{ .reg .f32 t; tanh.approx.f32 t, $2; fma.rn.ftz.f32 $0, t, 0f3F000000, 0f3F000000; neg.f32 t, $0; "
    "fma.rn.ftz.f32 $1, t, $0, $0; }"
)
SLOPE_GROUP = gl.constexpr(32)
_SLOPE_ASM = gl.constexpr(_accurate_with_slope(32))
_SLOPE_CONSTRAINTS = gl.constexpr(_constraints(32, 2))


@gluon.jit
def logit_coefficients(scale, bias, MODE: gl.constexpr):
    """(a, b) such that `sigmoid` takes a·qk + b. Both in the units its first instruction wants."""
    if MODE == FAST:
        return 0.5 * scale, 0.5 * bias
    return scale * _LOG2_E, bias * _LOG2_E + _LOG2_CURVATURE


@gluon.jit
def output_factor(MODE: gl.constexpr):
    """What a sum over `sigmoid` has to be multiplied by."""
    if MODE == FAST:
        return 1.0
    return 1.0 / _CURVATURE


@gluon.jit
def sigmoid(w, MODE: gl.constexpr):
    """σ times 1/`output_factor`, float32, of folded logits w."""
    if MODE == FAST:
        t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [w], gl.float32, is_pure=True, pack=1)
        return gl.fma(t, 0.5, 0.5)
    return gl.inline_asm_elementwise(
        _ACCURATE_ASM, _ACCURATE_CONSTRAINTS, [w], gl.float32, is_pure=True, pack=GROUP
    )


@gluon.jit
def sigmoid_and_slope(w, MODE: gl.constexpr):
    """σ and σ(1 − σ), both over `output_factor`; the slope's relative error in `low` is twice that of σ."""
    if MODE == FAST:
        return gl.inline_asm_elementwise(
            _FAST_SLOPE_ASM, "=&f,=&f,f", [w], (gl.float32, gl.float32), is_pure=True, pack=1
        )
    return gl.inline_asm_elementwise(
        _SLOPE_ASM, _SLOPE_CONSTRAINTS, [w], (gl.float32, gl.float32), is_pure=True, pack=SLOPE_GROUP
    )
