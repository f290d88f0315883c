"""The sigmoid kernels compile for Ampere and Hopper without a GPU; their loops do not spill; they fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stability.attention.triton.ahead_of_time import Compiled, compile_ahead

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

KERNELS = ("sigmoid_forward", "sigmoid_backward_keys", "sigmoid_backward_queries")
# Of a program, by the capability it is compiled for; 8.6 and 8.9 run the code of 8.0 and have the least.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
# Another Triton's folder of packages, as `pip install --no-deps --target FOLDER triton==3.6.0` makes one.
OTHER_TRITON = os.environ.get("STABILITY_OTHER_TRITON")

# What a call may ask for beyond the plain one.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"IS_CAUSAL": True},
    "everything": {
        "IS_CAUSAL": True, "GROUP": 4, "optional": ("lengths", "score_bias", "sums", "statistics"),
    },
    "packed": {"IS_CAUSAL": True, "optional": ("offsets",)},
    "fast": {"METHOD": 2},
}  # fmt: skip
OPTIONAL = {
    "lengths": ("key_lengths", "query_lengths"),
    "offsets": ("key_offsets", "query_offsets"),
    "score_bias": ("score_bias",),
    "sums": ("block_sums", "key_sums"),
    "statistics": ("row_sum", "derivative_max"),
}


def compile_variant(name: str, dtype: str, head_dim: int, capability: int, **variant: Any) -> Compiled:
    from stability.attention.triton import sigmoid

    is_float32 = dtype == "fp32"
    table = {
        "sigmoid_forward": (sigmoid.FORWARD_TILES, sigmoid.FORWARD_TILES_FLOAT32),
        "sigmoid_backward_keys": (sigmoid.KEYS_TILES, sigmoid.KEYS_TILES_FLOAT32),
        "sigmoid_backward_queries": (sigmoid.QUERIES_TILES, sigmoid.QUERIES_TILES_FLOAT32),
    }[name][is_float32]
    block_dim = max(16, 1 << (head_dim - 1).bit_length())
    block_q, block_k, num_warps, num_stages = table[max(64, block_dim)]
    kernel = getattr(sigmoid, name)
    constants = {
        "GROUP": 1, "HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_D": block_dim, "BLOCK_V": block_dim,
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "IS_CAUSAL": False, "METHOD": int(is_float32),
        **variant,
    }  # fmt: skip
    asked = constants.pop("optional", ())
    constants |= {name: None for group, names in OPTIONAL.items() if group not in asked for name in names}
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("_stride_d")}
    integers = ("lengths", "offsets")
    pointers = {name: "*i64" for group in integers for name in OPTIONAL[group]}
    pointers |= {name: "*fp32" for group in OPTIONAL if group not in integers for name in OPTIONAL[group]}
    pointers |= dict.fromkeys(("query", "key", "value", "output", "grad_output"), f"*{dtype}")
    pointers |= dict.fromkeys(("grad_query", "grad_key", "grad_value"), f"*{dtype}") | {"bias": "*fp32"}
    return compile_ahead(
        kernel, pointers, constants, capability=capability, num_warps=num_warps, num_stages=num_stages
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_loops_do_not_spill(name: str, head_dim: int, variant: str, capability: int) -> None:
    compiled = compile_variant(name, "bf16", head_dim, capability, **VARIANTS[variant])
    assert compiled.num_products > 0
    assert compiled.registers <= 255
    assert compiled.loop_spills == 0
    assert compiled.shared_memory <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_float32_multiplies_without_tensor_cores(name: str, head_dim: int) -> None:
    compiled = compile_variant(name, "fp32", head_dim, 80)
    assert "mma." not in compiled.ptx  # TF32 would keep 10 bits
    assert compiled.spilled_bytes == 0
    assert compiled.shared_memory <= SHARED_MEMORY[80]


@pytest.mark.parametrize("name", KERNELS)
def test_arguments_that_are_one_are_compiled_in(name: str) -> None:
    ones = ("tokens_q", "tokens_k", "heads", "num_blocks", "bias_stride_b", "bias_stride_h")
    for is_causal in (False, True):
        compile_variant(name, "fp16", 64, 90, IS_CAUSAL=is_causal, **dict.fromkeys(ones, 1))


@pytest.mark.skipif(OTHER_TRITON is None, reason="STABILITY_OTHER_TRITON names no folder with another Triton")
def test_with_the_other_triton() -> None:
    """In a process of its own, where the other Triton comes first; without the variants, which take long."""
    assert OTHER_TRITON is not None
    environment = {name: value for name, value in os.environ.items() if name != "STABILITY_OTHER_TRITON"}
    path = os.pathsep.join([OTHER_TRITON, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    command += ["-k", "plain or compiled_in"]
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
