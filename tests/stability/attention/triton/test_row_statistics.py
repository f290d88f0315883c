"""The streaming kernel against the chunked computation: here in Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stability.attention import AttentionCall
from stability.attention.moments import SATURATED_WEIGHT, row_quantities
from stability.attention.rows import select_rows
from stability.attention.streaming import stream_row_statistics
from stability.attention.validation import logit_terms

pytest.importorskip("triton", reason="Triton is not installed")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
compares = pytest.mark.skipif(
    not IS_INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter, or on a CUDA device"
)


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="the comparisons run in this process")
@pytest.mark.slow  # the interpreter takes a minute
def test_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "padded": {"key_lengths": [5, 38], "query_lengths": [3, 34], "enable_gqa": True},
    "empty": {"key_lengths": [0, 1], "enable_gqa": True},
    "boolean mask": {"attn_mask": "boolean"},
    "added mask": {"attn_mask": "added"},
    "added float16 mask of finite numbers": {"attn_mask": "float16"},
    "sharp": {"scale": 40.0},
    "collapsed": {"scale": 4000.0},
    "flat": {"scale": 1e-6},
    "zero scale": {"scale": 0.0},
    "negative scale": {"scale": -2.0},
}
SIGMOID_CASES = {
    "small weights": {"bias": -12.0},
    "small weights but for a few": {"bias": -7.0, "scale": 2.0},
    "small weights, causal": {"bias": -12.0, "is_causal": True},
    "dominated": {"bias": -20.0, "scale": 4.0},
    "dominated but for a few": {"bias": -5.0, "scale": 4.0},
    "vanishing weights": {"bias": -150.0, "scale": 2.0},
    "saturated weights": {"bias": 20.0, "scale": 3.0},
}


def make_call(mechanism: str, case: str) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    arguments = dict({**CASES, **SIGMOID_CASES}[case])
    query, key = random(2, 2, 34, 24), random(2, 1 if "enable_gqa" in arguments else 2, 38, 24)
    if arguments.get("attn_mask") == "boolean":
        arguments["attn_mask"] = random(2, 1, 34, 38) > 0.5
    elif arguments.get("attn_mask") == "added":
        arguments["attn_mask"] = random(2, 34, 38).masked_fill_(random(2, 34, 38) > 1, -torch.inf)
    elif arguments.get("attn_mask") == "float16":
        mask = random(2, 34, 38).masked_fill_(random(2, 34, 38) > 1, torch.finfo(torch.float16).min)
        mask[:, 5] = torch.finfo(torch.float16).min
        arguments["attn_mask"] = mask.half()
    if mechanism == "sigmoid" and case in CASES:
        arguments["bias"] = random(2)
        if "attn_mask" in arguments or "key_lengths" in arguments:
            arguments["score_bias"] = random(2, 38)
    return AttentionCall(mechanism, query.transpose(1, 2).contiguous().transpose(1, 2), key, **arguments)


@compares
@pytest.mark.parametrize(
    ("mechanism", "case", "rows"),
    [
        (mechanism, case, rows)
        for mechanism in ("softmax", "sigmoid")
        for case, rows in [*((case, None) for case in CASES), ("causal", 9), ("padded", 9)]
    ]
    + [("sigmoid", case, None) for case in SIGMOID_CASES],
)
def test_it_is_the_chunked_computation(mechanism: str, case: str, rows: int | None) -> None:
    call = make_call(mechanism, case)
    terms = logit_terms(call)
    selected = select_rows(
        rows, batch=2, tokens=34, lengths=terms.query_lengths, device=call.query.device, seed=0
    )
    # The chunked computation in float64, of the same float32 inputs.
    exact_call = AttentionCall(**{**vars(call), "query": call.query.double(), "key": call.key.double()})
    exact_terms = logit_terms(exact_call)
    scale = 1e-5 + 1e-6 * call.query.abs().max().item() * abs(terms.scale) * 24
    exact = row_quantities(
        exact_call.query, exact_call.key, call.mechanism, exact_terms, selected, exact_spectral=False
    )
    saturated_weight = SATURATED_WEIGHT if mechanism == "sigmoid" else None
    actual = stream_row_statistics(call.query, call.key, terms, selected, saturated_weight=saturated_weight)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        truth = exact[name]
        tolerance = scale * truth.abs() + 1e-15
        if name in ("max_logit", "log_sum_exp"):
            tolerance = tolerance + scale
        same = (value.double() == truth) | ((value.double() - truth).abs() <= tolerance)
        assert same.all(), (name, value[~same][:4], truth[~same][:4])


@compares
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", ["plain", "added mask"])
def test_nan_in_a_valid_row_comes_out(case: str, mechanism: str) -> None:
    call = make_call(mechanism, case)
    call.query[1, 1, 3, 4] = torch.nan
    terms = logit_terms(call)
    selected = select_rows(None, batch=2, tokens=34, lengths=None, device=call.query.device, seed=0)
    actual = stream_row_statistics(
        call.query, call.key, terms, selected, saturated_weight=0.99 if mechanism == "sigmoid" else None
    )
    for name, value in actual.items():
        if mechanism == "softmax" or name not in ("off_diagonal_share", "saturated_share"):
            assert value.isnan()[1, 1, 3], name
            assert value.isnan().sum() == 1, name
