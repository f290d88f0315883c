"""What the sigmoid attention kernels share: the sigmoid itself, tiles of rows, the extent of a sequence.

The sigmoid in three methods, chosen by what the inputs can show (largest relative error for x ≥ −20):

    EX2      1 / (1 + 2^(−x log₂e)), ex2.approx and rcp.approx     3e-6, far below what half precision rounds
    FLOAT32  the same with the product −x log₂e in two parts       5e-7
    TANH     ½ + ½ tanh(x/2), tanh.approx: one instruction less    absolute error 2e-6: noise below −12

Padding is silenced where it is loaded: a padded query, key, value or gradient row is read as zeros whatever
it holds, and a product with zeros adds nothing. Only the causal order needs a mask on the weights themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

EX2 = tl.constexpr(0)
FLOAT32 = tl.constexpr(1)
TANH = tl.constexpr(2)

# Triton's interpreter knows no PTX; there, the same formulas in plain operations.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
MINUS_LOG2_E_HIGH = tl.constexpr(-1.4426950216293335)  # in float32
MINUS_LOG2_E_LOW = tl.constexpr(-1.9259629911783e-8)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logit_unit(METHOD: tl.constexpr):
    """The factor `sigmoid` wants in its argument, so that it is folded into scale and bias."""
    unit: tl.constexpr = MINUS_LOG2_E if METHOD == EX2 else 0.5 if METHOD == TANH else 1.0
    return unit


@triton.jit
def sigmoid(z, METHOD: tl.constexpr):
    """σ(z / logit_unit), float32."""
    if METHOD == TANH:
        if IS_INTERPRETED:
            tanh = 1 - 2 / (1 + tl.exp2(z * (-2 * MINUS_LOG2_E)))
        else:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
            )
        return tl.fma(tanh, 0.5, 0.5)
    if METHOD == FLOAT32:
        # Infinite logits are used as masks; their correction would be ∞ − ∞.
        z = tl.clamp(z, -1000.0, 1000.0, propagate_nan=tl.PropagateNan.ALL)
        high = z * MINUS_LOG2_E_HIGH
        low = tl.fma(z, MINUS_LOG2_E_HIGH, -high) + z * MINUS_LOG2_E_LOW
        return 1 / (1 + tl.exp2(high) * tl.fma(low, LN_2, 1.0))
    if IS_INTERPRETED:
        return 1 / (1 + tl.exp2(z))
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 power;
        ex2.approx.ftz.f32 power, $1;
        add.ftz.f32 power, power, 0f3F800000;
        rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f",
        [z],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def extent(batch, tokens, lengths, offsets):
    """First, stored and valid tokens of a sequence that is padded to `tokens` or packed by `offsets`."""
    first = tl.cast(0, tl.int64)
    stored = tokens
    if offsets is not None:
        first = tl.load(offsets + batch).to(tl.int64)
        stored = (tl.load(offsets + batch + 1) - first).to(tl.int32)
    valid = stored
    if lengths is not None:
        valid = tl.load(lengths + batch).to(tl.int32)
    return first, stored, valid


@triton.jit
def tile(tensor, rows, stride_row, stride_dim, BLOCK_DIM: tl.constexpr):
    """Pointers [rows, BLOCK_DIM], with 64-bit offsets."""
    dims = tl.arange(0, BLOCK_DIM).to(tl.int64)
    return tensor + rows.to(tl.int64)[:, None] * stride_row + dims[None, :] * stride_dim


@triton.jit
def load_tile(pointers, rows, end, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_END: tl.constexpr):
    """The tile, zeros from row `end` (if HAS_END) and from column DIM on."""
    dims = tl.arange(0, BLOCK_DIM)
    if HAS_END and DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(rows < end)[:, None] & (dims < DIM)[None, :], other=0.0)
    if HAS_END:
        return tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(pointers, values, rows, valid, stored, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Writes the stored rows: values up to row `valid`, zeros in the padding."""
    dims = tl.arange(0, BLOCK_DIM)
    values = tl.where((rows < valid)[:, None], values, 0.0).to(pointers.dtype.element_ty)
    tl.store(pointers, values, mask=(rows < stored)[:, None] & (dims < DIM)[None, :])
