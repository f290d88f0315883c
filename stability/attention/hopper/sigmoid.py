"""The logistic function at one MUFU per element, as the Hopper kernels evaluate it.

σ(x) = eˣ/(1 + eˣ) needs two results of the special function unit (MUFU), exp2 and reciprocal, and that unit
gives one per 8 issue slots: at head_dim 64 two of them take as long as the tensor cores for the whole
element. Where every x ≤ −3.62, e = eˣ is small and one fused multiply-add replaces the reciprocal: σ ≈ e −
ce². That is where sigmoid attention lives at its default bias −ln n. Around x = 0, ½ + ½ tanh(x/2) by
tanh.approx takes one MUFU as well; its absolute error of 1e-6 shows below −5. So a warp tells three cases
apart, for all its elements at once:

    low       every x ≤ −3.62:  e − ce²
    central   every x ≥ −5:     ½ + ½ tanh(x/2), forward only, and asked for only where the bias is not low
    general   anything:         e/(1 + e)

The exponentials are on their way before the warp knows: low and general both need them, and comparing costs
half a slot an element, hidden under them. (Logits below zero, read as unsigned integers, order backwards, and
Hopper takes the smallest of three integers in one instruction.)

Errors. c = 0.97806 bounds the relative error of e − ce² by 1.23e-4 over `low`, and that of the slope
σ(1 − σ) ≈ (e − ce²)(1 − ce) by 2.46e-4; both vanish as x → −∞, so what sigmoid attention sums up is exact to
float32. `central` is good to 1e-4 and `general` to 1e-6, slope included: it is the product of e/(1 + e) and
1/(1 + e), without cancellation.

Scaled by c the polynomial needs no constant: with ẽ = ceˣ, cσ = ẽ − ẽ². The kernels therefore compute cσ and
divide their results by c.

The fast mode is ½ + ½ tanh(x/2) everywhere: relative error 1e-4 for x > −6, 1e-2 at −9, 1 at −16.
"""

import math
import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ACCURATE = gl.constexpr(0)
FAST = gl.constexpr(1)

LOW_BELOW = -3.62
CENTRAL_ABOVE = -5.0
CENTRAL_IS_LIKELY_ABOVE = -3.0  # a bias; logits spread around it
CURVATURE = 0.97806

LOG2_E = math.log2(math.e)
LOG2_CURVATURE = math.log2(CURVATURE)

_LOG2_E = gl.constexpr(LOG2_E)
_LOG2_CURVATURE = gl.constexpr(LOG2_CURVATURE)
_CURVATURE = gl.constexpr(CURVATURE)
_FLOAT16_SCALE = gl.constexpr(32768.0)  # the largest that keeps σ = 1 finite


def _folded(x: float) -> float:
    """The logit x as the kernels compute it: w = log₂(ceˣ)."""
    return x * LOG2_E + LOG2_CURVATURE


def _bits(value: float) -> str:
    """The float32 nearest to ``value`` as a PTX integer literal."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _float(value: float) -> str:
    """The float32 nearest to ``value`` as a PTX floating-point literal."""
    return "0f" + _bits(value)[2:]


def _vote(reduction: str, comparison: str, bound: float, operands: list[str], chains: int = 4) -> str:
    """Sets c to whether every operand of every lane is beyond ``bound``; several chains hide the latency."""
    lines = []
    for chain in range(chains):
        first, *others = operands[chain::chains]
        lines.append(f"mov.b32 m{chain}, {first};")
        lines += [f"mov.b32 n, {other}; {reduction} m{chain}, m{chain}, n;" for other in others]
    lines += [f"{reduction} m0, m0, m{chain};" for chain in range(1, chains)]
    lines.append(f"{comparison} c, m0, {_bits(_folded(bound))}; vote.sync.all.pred c, c, 0xffffffff;")
    return "\n".join(lines)


def _exponentials(logits: list[str]) -> str:
    """e0, e1, … = ẽ of every logit, and c = whether the low case holds."""
    exponentials = "\n".join(f"ex2.approx.ftz.f32 e{i}, {w};" for i, w in enumerate(logits))
    return exponentials + "\n" + _vote("min.u32", "setp.ge.u32", LOW_BELOW, logits)


# r = 1/(1 + eˣ). The bound keeps ẽ·r from ∞·0; a NaN stays one.
_GENERAL = (
    f"min.NaN.ftz.f32 e{{i}}, e{{i}}, {_float(2.0**100)}; "
    f"fma.rn.ftz.f32 r, e{{i}}, {_float(1 / CURVATURE)}, {_float(1.0)}; rcp.approx.ftz.f32 r, r; "
)
_DECLARATIONS = ".reg .pred c; .reg .b32 m<4>; .reg .b32 n; .reg .f32 t, r;"


def _weights_asm(elements: int) -> str:
    """PTX for cσ: outputs, then folded logits, then as many copies of the folded bias."""
    weights = [f"${i}" for i in range(elements)]
    logits = [f"${elements + i}" for i in range(elements)]
    half_ln2 = math.log(2) / 2
    central = [
        f"fma.rn.ftz.f32 t, {w}, {_float(half_ln2)}, {_float(-LOG2_CURVATURE * half_ln2)}; "
        f"tanh.approx.f32 t, t; fma.rn.ftz.f32 {p}, t, {_float(CURVATURE / 2)}, {_float(CURVATURE / 2)};"
        for p, w in zip(weights, logits, strict=True)
    ]
    general = [_GENERAL.format(i=i) + f"mul.ftz.f32 {p}, e{i}, r;" for i, p in enumerate(weights)]
    low = [f"neg.f32 t, e{i}; fma.rn.ftz.f32 {p}, t, e{i}, e{i};" for i, p in enumerate(weights)]
    newline = "\n"
    return f"""{{
    {_DECLARATIONS} .reg .f32 e<{elements}>;
    setp.lt.f32 c, ${2 * elements}, {_float(_folded(CENTRAL_IS_LIKELY_ABOVE))};
    @c bra.uni EXPONENTIALS;
    {_vote("max.u32", "setp.le.u32", CENTRAL_ABOVE, logits)}
    @!c bra.uni EXPONENTIALS;
    {newline.join(central)}
    bra.uni DONE;
    EXPONENTIALS:
    {_exponentials(logits)}
    @c bra.uni LOW;
    {newline.join(general)}
    bra.uni DONE;
    LOW:
    {newline.join(low)}
    DONE:
    }}"""


def _weights_and_slopes_asm(elements: int) -> str:
    """PTX for cσ and cσ(1 − σ): outputs of the first kind, of the second, then folded logits."""
    weights = [f"${i}" for i in range(elements)]
    slopes = [f"${elements + i}" for i in range(elements)]
    pairs = list(enumerate(zip(weights, slopes, strict=True)))
    general = [
        _GENERAL.format(i=i) + f"mul.ftz.f32 t, e{i}, r; mov.f32 {p}, t; mul.ftz.f32 {s}, t, r;"
        for i, (p, s) in pairs
    ]
    low = [
        f"neg.f32 t, e{i}; fma.rn.ftz.f32 r, t, e{i}, e{i}; mov.f32 {p}, r; fma.rn.ftz.f32 {s}, t, r, r;"
        for i, (p, s) in pairs
    ]
    newline = "\n"
    return f"""{{
    {_DECLARATIONS} .reg .f32 e<{elements}>;
    {_exponentials([f"${2 * elements + i}" for i in range(elements)])}
    @c bra.uni LOW;
    {newline.join(general)}
    bra.uni DONE;
    LOW:
    {newline.join(low)}
    DONE:
    }}"""


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=&f"] * outputs + ["f"] * inputs)


# Elements of a thread that one vote covers. Fewer cost votes, more cost registers, which the backward lacks.
WEIGHT_GROUP = 32
SLOPE_GROUP = 16

_WEIGHT_GROUP = gl.constexpr(WEIGHT_GROUP)
_WEIGHTS_ASM = gl.constexpr(_weights_asm(WEIGHT_GROUP))
_WEIGHTS_CONSTRAINTS = gl.constexpr(_constraints(WEIGHT_GROUP, 2 * WEIGHT_GROUP))
_SLOPE_GROUP = gl.constexpr(SLOPE_GROUP)
_SLOPES_ASM = gl.constexpr(_weights_and_slopes_asm(SLOPE_GROUP))
_SLOPES_CONSTRAINTS = gl.constexpr(_constraints(2 * SLOPE_GROUP, SLOPE_GROUP))
_FAST_SLOPES_ASM = gl.constexpr(
    "{ .reg .f32 t; tanh.approx.f32 t, $2; fma.rn.ftz.f32 $0, t, 0f3F000000, 0f3F000000; neg.f32 t, $0; "
    "fma.rn.ftz.f32 $1, t, $0, $0; }"
)


@gluon.jit
def logit_coefficients(scale, bias, MODE: gl.constexpr):
    """(a, b) such that `sigmoid` takes a·qk + b. Both in the units its first instruction wants."""
    if MODE == FAST:
        return 0.5 * scale, 0.5 * bias
    return scale * _LOG2_E, bias * _LOG2_E + _LOG2_CURVATURE


@gluon.jit
def slope_factor(MODE: gl.constexpr):
    """What a sum over slopes has to be multiplied by."""
    if MODE == FAST:
        return 1.0
    return 1.0 / _CURVATURE


@gluon.jit
def weight_factor(MODE: gl.constexpr, dtype: gl.constexpr):
    """What a sum over `narrow` weights has to be multiplied by."""
    if dtype == gl.float16:
        return slope_factor(MODE) / _FLOAT16_SCALE
    return slope_factor(MODE)


@gluon.jit
def narrow(p, dtype: gl.constexpr):
    """Weights as operands of a matrix product. float16 gets coarse below 6e-5, where weights of 1/n lie."""
    if dtype == gl.float16:
        p *= _FLOAT16_SCALE
    return p.to(dtype)


@gluon.jit
def sigmoid(w, b, MODE: gl.constexpr):
    """σ times a constant (see `slope_factor`), float32, of folded logits w around the folded bias b."""
    if MODE == FAST:
        t = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [w], gl.float32, is_pure=True, pack=1
        )
        return gl.fma(t, 0.5, 0.5)
    return gl.inline_asm_elementwise(
        _WEIGHTS_ASM, _WEIGHTS_CONSTRAINTS, [w, b], gl.float32, is_pure=True, pack=_WEIGHT_GROUP
    )


@gluon.jit
def sigmoid_and_slope(w, MODE: gl.constexpr):
    """σ and σ(1 − σ), both times a constant (see `slope_factor`)."""
    if MODE == FAST:
        return gl.inline_asm_elementwise(
            _FAST_SLOPES_ASM, "=&f,=&f,f", [w], (gl.float32, gl.float32), is_pure=True, pack=1
        )
    return gl.inline_asm_elementwise(
        _SLOPES_ASM, _SLOPES_CONSTRAINTS, [w], (gl.float32, gl.float32), is_pure=True, pack=_SLOPE_GROUP
    )
