"""The kernel compiles for Hopper ahead of time, without a GPU, for tensor cores."""

from __future__ import annotations

import pytest
import torch

from stability.attention.streaming import _configuration

pytest.importorskip("triton", reason="Triton is not installed")

CONSTANTS = {
    "HEAD_DIM": 64,
    "IS_CAUSAL": True,
    "HAS_KEY_LENGTHS": True,
    "MASK": 0,
    "HAS_SCORE_BIAS": False,
    "SCALE_FIRST": False,
    "SATURATED": 0.99,
    "BLOCK_D": 64,
}
POINTERS = {
    "query": "*bf16",
    "key": "*bf16",
    "rows": "*i64",
    "weights": "*i64",
    "key_lengths": "*i64",
    "mask": "*bf16",
    "score_bias": "*bf16",
    "output": "*fp32",
}


@pytest.mark.slow
@pytest.mark.parametrize(("is_sigmoid", "bias"), [(False, "fp32"), (True, "fp32"), (True, "*fp32")])
def test_it_compiles_for_sm_90_without_local_arrays(is_sigmoid: bool, bias: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from stability.attention.triton.row_statistics import row_statistics

    names = row_statistics.arg_names
    configuration = _configuration(torch.bfloat16, 64, is_sigmoid)
    blocks = {name: configuration.pop(name) for name in ("BLOCK_ROWS", "BLOCK_KEYS")}
    constants = {**CONSTANTS, **blocks, "IS_SIGMOID": is_sigmoid, "IS_BIAS_TENSOR": bias == "*fp32"}
    types = {**POINTERS, "bias": bias}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        row_statistics,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    kernel = compile(source, target=GPUTarget("cuda", 90, 32), options=configuration)
    ptx = kernel.asm["ptx"]
    assert "wgmma" in ptx
    assert ".local" not in ptx
