"""The kernels of sigmoid attention on a GPU: head dimensions, long and odd lengths, races, stray writes."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stability.attention import explain, hopper, sigmoid_attention
from stability.attention.dispatch import why_not_hopper
from stability.attention.statistics import attention_statistics
from stability.testing import assert_within_error_budget

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.gpu

# Where each implementation allocates its results.
MODULES = {
    "triton": ("stability.attention.triton.sigmoid",),
    "hopper": (
        "stability.attention.hopper.sigmoid_forward",
        "stability.attention.hopper.sigmoid_backward",
    ),
}
HALF = (torch.bfloat16, torch.float16)


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def skip_if_refused(implementation: str, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> None:
    if implementation == "hopper":
        defaults = {
            "scale": 1.0, "bias": query.new_zeros(query.shape[:2]).float(), "score_bias": None,
            "key_lengths": None, "query_lengths": None, "is_causal": False, "is_fast": False,
        }  # fmt: skip
        reason = why_not_hopper(
            query, key, value, is_packed=False, needs_statistics=False, **{**defaults, **arguments}
        )
        if reason is not None:
            pytest.skip(reason)


def output_and_gradients(
    implementation: str, arguments: dict[str, Any], *inputs: Tensor
) -> tuple[Tensor, ...]:
    *leaves, grad_output = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = sigmoid_attention(*leaves, implementation=implementation, **arguments)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def check(implementation: str, inputs: list[Tensor], arguments: dict[str, Any]) -> None:
    skip_if_refused(implementation, *inputs[:3], is_causal=arguments.get("is_causal", False))
    assert_within_error_budget(
        output_and_gradients(implementation, arguments, *inputs),
        lambda *tensors: output_and_gradients("reference", arguments, *tensors),
        inputs,
        # Of a few float32 numbers the reference's error is a matter of luck, and σ may err by 2e-6 of itself.
        factor=6.0 if inputs[0].dtype is torch.float32 else 3.0,
    )


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 20, 24, 40, 64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_head_dimension(
    implementation: str, dtype: torch.dtype, head_dim: int, is_causal: bool
) -> None:
    inputs = [make(2, 200, 3, head_dim, dtype=dtype, seed=seed).transpose(1, 2) for seed in range(4)]
    check(implementation, inputs, {"is_causal": is_causal, "key_lengths": [200, 77]})


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 111, 127, 128, 129, 191, 193, 8191])
def test_every_length(implementation: str, dtype: torch.dtype, tokens: int) -> None:
    if dtype is torch.float32 and tokens > 4000:
        tokens = 2047  # without tensor cores
    heads = 1 if tokens > 1000 else 3
    inputs = [make(1, heads, tokens, 64, dtype=dtype, seed=seed) for seed in range(4)]
    for is_causal in (False, True):
        check(implementation, inputs, {"is_causal": is_causal})


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_is_bfloat16s_at_every_length(implementation: str, head_dim: int) -> None:
    for tokens in (512, 2048, 8192, 16384):
        query, key, value = (make(1, 2, tokens, head_dim, dtype=torch.bfloat16, seed=s) for s in range(3))
        skip_if_refused(implementation, query, key, value)
        output = sigmoid_attention(query, key, value, implementation=implementation).double()
        rows = torch.arange(0, tokens, 16, device="cuda")
        logits = query[:, :, rows].double() @ key.double().mT / math.sqrt(head_dim) - math.log(tokens)
        exact = logits.sigmoid() @ value.double()
        error = (output[:, :, rows] - exact).norm() / exact.norm()
        assert error <= 2.5e-3, tokens


@pytest.mark.parametrize("implementation", MODULES)
def test_races_would_show_in_repeated_runs(implementation: str) -> None:
    """Fused gradients add in no fixed order: all but grad_query are bitwise the same, that one nearly."""
    inputs = [make(4, 4, 1111, 128, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    skip_if_refused(implementation, *inputs[:3])
    arguments = {"key_lengths": torch.tensor([1111, 640, 63, 1], device="cuda")}
    first = output_and_gradients(implementation, arguments, *inputs)
    for _ in range(200):
        again = output_and_gradients(implementation, arguments, *inputs)
        for index, (a, b) in enumerate(zip(first, again, strict=True)):
            if index == 1 and implementation == "hopper":
                assert (a.float() - b.float()).norm() <= 1e-3 * a.float().norm()
            else:
                assert torch.equal(a, b), index


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("tokens", [1, 63, 111, 8191])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_nothing_is_written_outside_of_the_results(
    implementation: str, tokens: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results lie between guards of 64 KiB that must survive."""
    guards: list[Tensor] = []
    guard = 1 << 14

    def between_guards(tensor: Tensor, dim: int, *, is_zeroed: bool = False) -> Tensor:
        batch, heads, tokens, _ = tensor.shape
        buffer = torch.full((batch * tokens * heads * dim + 2 * guard,), torch.nan, device="cuda").to(
            tensor.dtype
        )
        buffer[:guard] = buffer[-guard:] = 7.0
        guards.extend((buffer[:guard], buffer[-guard:]))
        return buffer[guard:-guard].view(batch, tokens, heads, dim).transpose(1, 2)

    inputs = [make(2, tokens, 2, head_dim, dtype=torch.bfloat16, seed=s).transpose(1, 2) for s in range(4)]
    skip_if_refused(implementation, *inputs[:3])
    for name in MODULES[implementation]:
        monkeypatch.setattr(importlib.import_module(name), "empty_like_tokens", between_guards)
    results = output_and_gradients(implementation, {"key_lengths": [tokens, tokens // 2]}, *inputs)
    assert len(guards) >= 8  # before and behind the output and three gradients
    assert all((values == 7.0).all() for values in guards)
    assert all(result.isfinite().all() for result in results)  # the rest was NaN: everything has been written


@pytest.mark.parametrize("implementation", MODULES)
def test_offsets_beyond_32_bits(implementation: str) -> None:
    """Query and output of 2³¹ elements and more; the last rows of the last head must be right."""
    batch, heads, tokens, head_dim = 2, 128, 66_000, 128
    needed = 2 * batch * heads * tokens * head_dim * 2
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    query = torch.empty(batch, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    query.normal_()
    key, value = (make(batch, 1, 128, head_dim, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    skip_if_refused(implementation, query, key, value)
    output = sigmoid_attention(query, key, value, enable_gqa=True, implementation=implementation)
    expected = sigmoid_attention(query[-1:, -1:, -64:], key[-1:], value[-1:], implementation="reference")
    torch.testing.assert_close(output[-1:, -1:, -64:], expected, rtol=2e-2, atol=2e-2)


def test_memory_that_is_not_aligned() -> None:
    """A view that begins 2 bytes behind a 16-byte boundary."""
    storage = torch.randn(3 * 100 * 64 + 1, device="cuda").to(torch.bfloat16)
    query, key, value = storage[1:].view(3, 1, 1, 100, 64).unbind(0)
    actual = sigmoid_attention(query, key, value)
    expected = sigmoid_attention(query, key, value, implementation="reference")
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-2)
    assert explain(query, key, value).implementation == "triton"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_what_explain_says_on_this_device(head_dim: int, dtype: torch.dtype) -> None:
    query, key, value = (make(1, 2, 256, head_dim, dtype=dtype, seed=seed) for seed in range(3))
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and hopper.why_only_by_name() is None
    explanation = explain(query, key, value)
    assert explanation.implementation == ("hopper" if is_hopper else "triton"), str(explanation)
    assert explain(query.float(), key.float(), value.float()).implementation == "triton"
    assert explain(query.double(), key.double(), value.double()).implementation == "reference"


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fast_precision_is_close_and_not_accurate(implementation: str, head_dim: int) -> None:
    query, key, value = (make(1, 2, 8192, head_dim, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    skip_if_refused(implementation, query, key, value, is_fast=True)
    exact = sigmoid_attention(query.double(), key.double(), value.double())
    errors = {
        precision: (
            sigmoid_attention(query, key, value, implementation=implementation, precision=precision) - exact
        ).norm()
        / exact.norm()
        for precision in ("accurate", "fast")
    }
    assert errors["accurate"] < errors["fast"] < 5e-3


def test_no_synchronisation() -> None:
    query, key, value = (make(2, 4, 256, 64, dtype=torch.bfloat16, seed=s).requires_grad_() for s in range(3))
    bias, lengths = torch.zeros(4, device="cuda", requires_grad=True), torch.tensor([256, 10], device="cuda")

    def run() -> None:
        sigmoid_attention(query, key, value, bias=bias, key_lengths=lengths).sum().backward()
        sigmoid_attention(query, key, value, key_lengths=lengths).sum().backward()

    run()  # the first run compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("implementation", MODULES)
def test_a_replayed_graph_computes_what_its_inputs_hold_by_then(implementation: str) -> None:
    """Forward and backward, with lengths that change."""
    leaves = [make(2, 4, 256, 64, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in range(3)]
    lengths = torch.tensor([256, 10], device="cuda")
    skip_if_refused(implementation, *leaves, key_lengths=lengths, query_lengths=lengths)

    def run(name: str) -> tuple[Tensor, ...]:
        output = sigmoid_attention(*leaves, key_lengths=lengths, query_lengths=lengths, implementation=name)
        return output, *torch.autograd.grad(output.float().sin().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(implementation)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(implementation)
    for seed in (3, 6):
        with torch.no_grad():
            for i, leaf in enumerate(leaves):
                leaf.copy_(make(*leaf.shape, dtype=leaf.dtype, seed=seed + i))
            lengths.copy_(torch.tensor([7 * seed, 250]))
        graph.replay()
        torch.testing.assert_close(results, run("reference"), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("implementation", MODULES)
def test_tensors_on_a_device_that_is_not_the_current_one(implementation: str) -> None:
    tensors = [make(1, 2, 200, 64, dtype=torch.bfloat16, seed=seed).to("cuda:1") for seed in range(3)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    skip_if_refused(implementation, *leaves)
    outputs = [sigmoid_attention(*leaves, implementation=name) for name in (implementation, "reference")]
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    actual, expected = (torch.autograd.grad(output.float().sin().sum(), leaves) for output in outputs)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    query, key = leaves[0].detach(), leaves[1].detach()
    sums = [attention_statistics(query, key, mechanism="sigmoid").row_sum for query, key in (
        (query, key), (query.cpu(), key.cpu()),
    )]  # fmt: skip
    torch.testing.assert_close(sums[0].cpu(), sums[1], rtol=1e-4, atol=0.0)
