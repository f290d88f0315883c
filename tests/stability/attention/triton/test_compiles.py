"""The streaming kernel compiles for Hopper without a GPU and keeps its sums in registers."""

from __future__ import annotations

import pytest

from tests.stability.attention.triton.ahead_of_time import compile_ahead

pytest.importorskip("triton", reason="Triton is not installed")

CONSTANTS = {
    "heads": 16,
    "group": 1,
    "head_dim": 64,
    "IS_CAUSAL": True,
    "HAS_KEY_LENGTHS": True,
    "MASK": 0,
    "HAS_SCORE_BIAS": False,
    "SATURATED_WEIGHT": 0.99,
    "BLOCK_D": 64,
    "BLOCK_ROWS": 64,
}
POINTERS = {
    "query": "*bf16",
    "key": "*bf16",
    "rows": "*i64",
    "weights": "*i64",
    "key_lengths": "*i64",
    "mask": "*bf16",
    "score_bias": "*bf16",
    "bias": "*fp32",
    "output": "*fp32",
}


@pytest.mark.slow
@pytest.mark.parametrize(("is_sigmoid", "block_keys"), [(False, 128), (True, 64)])
def test_it_compiles_for_sm_90_without_spills(is_sigmoid: bool, block_keys: int) -> None:
    from stability.attention.triton.row_moments import row_moments

    compiled = compile_ahead(
        row_moments,
        POINTERS,
        {**CONSTANTS, "IS_SIGMOID": is_sigmoid, "BLOCK_KEYS": block_keys},
        capability=90,
        num_warps=4,
        num_stages=2,
    )
    assert "wgmma" in compiled.ptx
    assert compiled.spilled_bytes == 0
