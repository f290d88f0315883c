"""The Hopper kernels on a Hopper GPU: every option at odd sizes, garbage in padding, races, stray writes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from stability.attention import hopper

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
# Relative Frobenius error that rounding inputs of products to 8 or 11 bits causes, with room.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}

# heads, key heads, queries, keys, options
CALLS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "1": (2, 2, 1, 1, {}),
    "63": (2, 2, 63, 63, {}),
    "111": (2, 2, 111, 111, {}),
    "8191": (1, 1, 8191, 8191, {}),
    "111 x 333": (2, 2, 111, 333, {}),
    "grouped": (6, 2, 300, 300, {}),
    "causal": (2, 2, 777, 777, {"is_causal": True}),
    "causal 700 x 300": (2, 2, 700, 300, {"is_causal": True}),
    "causal 300 x 700": (2, 2, 300, 700, {"is_causal": True}),
    "causal grouped": (4, 2, 333, 333, {"is_causal": True}),
    "lengths": (2, 2, 600, 600, {"lengths": ((11, 600), (600, 37))}),
    "no keys, no queries": (2, 2, 200, 200, {"lengths": ((200, 0), (0, 200))}),
    "causal lengths": (2, 2, 600, 600, {"lengths": ((600, 111), (300, 600)), "is_causal": True}),
    "score bias": (2, 2, 333, 333, {"score_bias": 2}),
    "shared score bias, lengths": (2, 2, 333, 333, {"score_bias": 1, "lengths": ((333, 111), (200, 200))}),
    "everything": (
        4, 2, 500, 500,
        {"score_bias": 2, "lengths": ((500, 111), (300, 500)), "is_causal": True},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _can_run() -> None:
    query = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    if (reason := hopper.can_run(query, query, query)) is not None:
        pytest.skip(reason)


def make(call: str, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key, value and the output's gradient, tokens before heads in memory, NaN in the padding."""
    heads, key_heads, tokens_q, tokens_k, options = CALLS[call]
    options = dict(options)
    query_lengths, key_lengths = options.pop("lengths", (None, None))
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    query, grad = (random(2, tokens_q, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(2))
    key, value = (random(2, tokens_k, key_heads, head_dim).to(dtype).transpose(1, 2) for _ in range(2))
    score_bias = random(options.pop("score_bias"), tokens_k) if "score_bias" in options else None
    for lengths, tensors in ((query_lengths, (query, grad)), (key_lengths, (key, value))):
        for i, length in enumerate(lengths or ()):
            for tensor in tensors:
                tensor[i, :, length:] = torch.nan
    if score_bias is not None and key_lengths is not None:
        score_bias[:, max(key_lengths) :] = torch.nan
    arguments = {
        "scale": head_dim**-0.5, "bias": -9 * torch.rand(2, heads, generator=generator, device="cuda"),
        "score_bias": score_bias, "is_causal": False, **options,
        "query_lengths": None if query_lengths is None else torch.tensor(query_lengths, device="cuda"),
        "key_lengths": None if key_lengths is None else torch.tensor(key_lengths, device="cuda"),
    }  # fmt: skip
    return [query, key, value, grad], arguments


def exact(inputs: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of query, key, value, bias and score_bias in float64."""
    query, key, value, grad = (tensor.nan_to_num().double() for tensor in inputs)
    bias, score_bias = arguments["bias"].double(), arguments["score_bias"]
    leaves = [query, key, value, bias]
    if score_bias is not None:
        score_bias = score_bias.nan_to_num().double()
        leaves.append(score_bias)
    for leaf in leaves:
        leaf.requires_grad_()
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).mT * arguments["scale"] + bias[:, :, None, None]
    if score_bias is not None:
        logits = logits + score_bias[:, None, None]
    rows, columns = (torch.arange(size, device="cuda") for size in logits.shape[2:])
    is_seen = torch.ones_like(logits, dtype=torch.bool)
    if arguments["is_causal"]:
        is_seen &= rows[:, None] >= columns
    if arguments["query_lengths"] is not None:
        is_seen &= (rows < arguments["query_lengths"][:, None])[:, None, :, None]
    if arguments["key_lengths"] is not None:
        is_seen &= (columns < arguments["key_lengths"][:, None])[:, None, None]
    output = (logits.sigmoid() * is_seen) @ value.repeat_interleave(group, 1)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def compute(inputs: list[Tensor], arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    query, key, value, grad = inputs
    output = hopper.forward(query, key, value, **arguments)
    gradients = hopper.backward(
        grad, query, key, value, **arguments,
        needs_bias_grad=True, needs_score_bias_grad=arguments["score_bias"] is not None, **options,
    )  # fmt: skip
    return [output, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_against_float64(call: str, head_dim: int, dtype: torch.dtype, is_deterministic: bool) -> None:
    inputs, arguments = make(call, head_dim, dtype)
    expected = exact(inputs, arguments)
    actual = compute(inputs, arguments, is_deterministic=is_deterministic)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        # A gradient of a bias sums up rounding errors of both signs and much that cancels.
        assert error <= TOLERANCE[dtype] * (10 if index > 3 else 1.5), (index, error)
    for index, lengths in (
        (0, "query_lengths"),
        (1, "query_lengths"),
        (2, "key_lengths"),
        (3, "key_lengths"),
    ):
        if arguments[lengths] is not None:
            for sequence, length in zip(actual[index], arguments[lengths], strict=True):
                assert (sequence[:, length:] == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float16_keeps_weights_below_its_normal_range(head_dim: int) -> None:
    inputs, arguments = make("8191", head_dim, torch.float16)
    arguments["bias"] = torch.full_like(arguments["bias"], -13.0)
    actual, expected = compute(inputs, arguments), exact(inputs, arguments)
    for index in (0, 3):  # the output and the value's gradient, which take the weights as operands
        error = (actual[index].double() - expected[index]).norm() / expected[index].norm()
        assert error <= 6e-4, (index, error)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", ["everything", "8191"])
def test_races_would_show_in_repeated_runs(call: str, head_dim: int) -> None:
    inputs, arguments = make(call, head_dim, torch.bfloat16)
    first = compute(inputs, arguments, is_deterministic=True)
    fused = compute(inputs, arguments)
    for _ in range(50):
        for a, b in zip(first, compute(inputs, arguments, is_deterministic=True), strict=True):
            assert torch.equal(a, b)
        for index, (a, b) in enumerate(zip(fused, compute(inputs, arguments), strict=True)):
            if index == 1:  # dQ adds in no fixed order
                assert (a.float() - b.float()).norm() <= 1e-3 * a.float().norm()
            else:
                assert torch.equal(a, b), index


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", ["1", "63", "111", "8191", "everything", "no keys, no queries"])
def test_results_are_written_wholly_and_nothing_else_is(
    call: str, head_dim: int, is_deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are full of NaN before, and lie between guards of 64 KiB that must survive."""
    guards: list[Tensor] = []
    guard = 1 << 15

    def between_guards(tensor: Tensor, dim: int, *, is_zeroed: bool = False) -> Tensor:
        batch, heads, tokens, _ = tensor.shape
        buffer = tensor.new_full((batch * tokens * heads * dim + 2 * guard,), torch.nan)
        buffer[:guard] = buffer[-guard:] = 7.0
        guards.extend((buffer[:guard], buffer[-guard:]))
        return buffer[guard:-guard].view(batch, tokens, heads, dim).transpose(1, 2)

    inputs, arguments = make(call, head_dim, torch.bfloat16)
    for name in ("sigmoid_forward", "sigmoid_backward"):
        module = importlib.import_module(f"stability.attention.hopper.{name}")
        monkeypatch.setattr(module, "empty_like_tokens", between_guards)
    results = compute(inputs, arguments, is_deterministic=is_deterministic)
    assert len(guards) >= 8
    assert all((values == 7.0).all() for values in guards)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fast_mode(head_dim: int) -> None:
    inputs, arguments = make("causal lengths", head_dim, torch.bfloat16)
    arguments["bias"] = torch.zeros_like(arguments["bias"])
    expected = exact(inputs, arguments)
    for a, b in zip(compute(inputs, arguments | {"is_fast": True}), expected, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


# Lengths of every sequence, tokens of all: tiles of 128 or 192 rows, some 132 multiprocessors.
RAGGED: dict[str, tuple[list[int], int]] = {
    "fewer tiles than multiprocessors": ([300, 0, 77], 300),
    "many sequences, most of them empty": ([0, 0, 999, 1, 0, 500, 0, 0] * 12, 1000),
    "nothing but padding": ([0] * 64, 1000),
    "one long, many short": ([4000] + [64] * 40, 4000),
}


def make_ragged(case: str, head_dim: int, is_causal: bool, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call on sequences of unequal lengths, NaN in the padding."""
    lengths, tokens = RAGGED[case]
    generator = torch.Generator("cuda").manual_seed(seed)
    points = [
        torch.randn(len(lengths), tokens, 4, head_dim, generator=generator, device="cuda").bfloat16()
        for _ in range(3)
    ]
    for tensor in points:
        for i, length in enumerate(lengths):
            tensor[i, length:] = torch.nan
    names = ("query", "key", "value")
    return {name: tensor.transpose(1, 2) for name, tensor in zip(names, points, strict=True)} | {
        "bias": torch.full((len(lengths), 4), -5.0, device="cuda"), "scale": head_dim**-0.5,
        "score_bias": None, "is_causal": is_causal,
        "query_lengths": torch.tensor(lengths, device="cuda"),
        "key_lengths": torch.tensor(lengths, device="cuda"),
    }  # fmt: skip


@pytest.fixture
def _outputs_hold_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no tile writes shows, even where the memory held a result of an equal call."""
    module = importlib.import_module("stability.attention.hopper.sigmoid_forward")
    make_output = module.empty_like_tokens
    monkeypatch.setattr(module, "empty_like_tokens", lambda *of: make_output(*of).fill_(torch.nan))


@pytest.mark.usefixtures("_outputs_hold_nan")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", RAGGED)
def test_every_tile_is_drawn(case: str, head_dim: int, is_causal: bool) -> None:
    """A sequence by itself has few tiles, which all are the first ones of their programs."""
    call = make_ragged(case, head_dim, is_causal)
    alone = [
        hopper.forward(**{
            name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in call.items()
        })
        for i in range(len(call["query"]))
    ]  # fmt: skip
    expected = torch.cat(alone)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(hopper.forward(**call), expected)


@pytest.mark.usefixtures("_outputs_hold_nan")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_launches_at_the_same_time_do_not_share_a_counter(head_dim: int) -> None:
    calls = [make_ragged(case, head_dim, False, seed) for seed, case in enumerate(RAGGED)]
    expected = [hopper.forward(**call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        outputs = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(hopper.forward(**call))
        torch.cuda.synchronize()
        for output, value in zip(outputs, expected, strict=True):
            assert torch.equal(output, value)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_replayed_graph_counts_from_zero_again(head_dim: int) -> None:
    call = make_ragged("many sequences, most of them empty", head_dim, False)
    expected = hopper.forward(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = hopper.forward(**call)
    for _ in range(3):
        output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(output, expected)
