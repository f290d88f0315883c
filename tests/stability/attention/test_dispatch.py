"""The rule by which an implementation is chosen, and what is said about it, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.func import jvp

from stability.attention import dispatch, explain, kernel_call, sigmoid_attention
from stability.attention.call import AttentionCall
from stability.attention.operands import make_operands
from stability.attention.operator import attend
from stability.attention.validation import LogitTerms, logit_terms


@pytest.fixture
def _a_capable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_machine_reason", lambda device_type, index: None)


def reason(query: torch.Tensor, *, dropout_p: float = 0.0, is_fast: bool = False, **arguments) -> str | None:
    terms: LogitTerms = logit_terms(AttentionCall("sigmoid", query, query, **arguments))
    return dispatch.why_not_triton(query, query, terms, dropout_p=dropout_p, is_fast=is_fast)


def test_auto_is_the_reference_on_the_cpu_and_explain_says_why() -> None:
    x = torch.zeros(1, 1, 2, 4)
    explanation = explain(x, x, x)
    assert explanation.implementation == "reference"
    assert set(explanation.refusals) == {"hopper", "triton"}
    assert str(explanation).startswith("sigmoid_attention runs on 'reference'.\n  not 'hopper': ")


@pytest.mark.parametrize("implementation", ["triton", "hopper"])
def test_a_kernel_asked_for_by_name_is_an_error_with_the_reason(implementation: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=f"'{implementation}': (the tensors are on 'cpu'|Triton is not)"):
        sigmoid_attention(x, x, x, implementation=implementation)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_fast_precision_is_not_computed_slowly(implementation: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="'reference': it has precision \"accurate\" only"):
        sigmoid_attention(x, x, x, implementation=implementation, precision="fast")
    with pytest.raises(ValueError, match="'reference': it has precision"):
        explain(x, x, x, precision="fast")


def test_unknown_names_list_the_valid_ones() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="'auto', 'hopper', 'triton', 'reference'; got 'cudnn'"):
        sigmoid_attention(x, x, x, implementation="cudnn")
    with pytest.raises(ValueError, match="`precision` must be one of 'accurate', 'fast'; got 'tf32'"):
        sigmoid_attention(x, x, x, precision="tf32")


@pytest.mark.usefixtures("_a_capable_machine")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "arguments", "expected"),
    [
        (64, torch.bfloat16, {}, None),
        (256, torch.float32, {}, None),
        (1, torch.float16, {"is_fast": True}, None),
        (64, torch.float64, {}, "not torch.float64"),
        (257, torch.float16, {}, "end at 256, not 257"),
        (64, torch.float16, {"attn_mask": torch.ones(2, 2).bool()}, "no `attn_mask`"),
        (64, torch.float16, {"dropout_p": 0.1}, "no dropout"),
        (64, torch.float32, {"is_fast": True}, 'precision "fast" is for float16 and bfloat16'),
    ],
)
def test_the_portable_kernels_limits(
    head_dim: int, dtype: torch.dtype, arguments: dict, expected: str
) -> None:
    found = reason(torch.zeros(1, 1, 2, head_dim, dtype=dtype), **arguments)
    assert found is None if expected is None else expected in found


@pytest.mark.usefixtures("_a_capable_machine")
def test_transforms_go_through_the_reference() -> None:
    x = torch.randn(1, 1, 2, 4)
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(reason(x))
        return sigmoid_attention(x, x, x)

    jvp(function, (x,), (x,))
    assert "torch.func transforms" in found[0]
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in reason(x)
    assert reason(x) is None


def test_the_limits_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    look = dispatch._cached_machine_reason.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "8.0 (Ampere) or newer, not 7.5" in look("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert look("cuda", 0) is None
    assert "'mps', not on a CUDA device" in look("mps", None)


def test_without_triton_the_reference_computes_and_says_so() -> None:
    code = (
        "import importlib.util, torch\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from stability.attention import explain\n"
        "print(explain(*[torch.zeros(1, 1, 2, 4)] * 3))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not 'triton': Triton is not installed." in result.stdout


def test_the_package_is_imported_once_more() -> None:
    """As by tests and notebooks that drop modules to get their code anew."""
    code = (
        "import sys, stability as first\n"
        "for name in [name for name in sys.modules if name.startswith('stability')]:\n"
        "    del sys.modules[name]\n"
        "import torch, stability\n"
        "from stability.attention.operator import _forward\n"
        "assert stability is not first\n"
        "x = torch.empty(1, 1, 2, 4, device='meta')\n"
        "options = dict(scale=1.0, is_causal=False, is_fast=False, implementation='auto')\n"
        "options |= dict(max_tokens_q=2, max_tokens_k=2, needs_statistics=False)\n"
        "print(_forward(x, x, x, x[:, :, 0, 0], *[None] * 5, **options)[0].shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "torch.Size([1, 1, 2, 4])\n", result.stderr


def test_the_graph_says_what_was_computed() -> None:
    """Anomaly mode and profiles show these names."""
    key = torch.empty(1, 1, 2, 4, device="meta")
    query = torch.empty_like(key, requires_grad=True)
    operands = make_operands(query, key, key, logit_terms(AttentionCall("sigmoid", query, key)))
    output, _, _ = attend(operands, scale=1.0, is_causal=False, is_fast=False, implementation="auto")
    assert output.grad_fn.name() == "_SigmoidAttentionBackward"
    (grad,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    assert grad.grad_fn.name() == "_SigmoidAttentionGradientsBackward"


def test_compiled_code_follows_autocast() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="eager")
    x = torch.randn(1, 2, 4, 8)
    assert compiled(x, x, x).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x, x, x).dtype is torch.bfloat16
    assert compiled(x, x, x).dtype is torch.float32


def test_it_compiles_into_one_graph_on_the_cpu() -> None:
    query, key, value = (torch.randn(2, 2, 8, 4, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([8, 3])

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return sigmoid_attention(*tensors, key_lengths=lengths, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), function(query, key, value))


def test_graphs_and_exports_hold_for_every_number_of_tokens() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return sigmoid_attention(x, x, x)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    inputs = [torch.randn(1, 2, tokens, 4, dtype=torch.float64) for tokens in range(4, 9)]
    for x in inputs:
        torch.testing.assert_close(compiled(x), function(x))
    assert counter.frame_count == 2  # one for the first, one for all others

    class Model(torch.nn.Module):
        forward = staticmethod(function)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(Model(), (inputs[0],), dynamic_shapes=({2: tokens},)).module()
    for x in inputs:
        torch.testing.assert_close(exported(x), function(x))


def test_transforms_inside_compiled_code_go_through_the_reference() -> None:
    def seen(x: torch.Tensor) -> torch.Tensor:
        return x + dispatch.is_transformed()

    torch._dynamo.reset()
    x = torch.zeros(3)
    assert torch.equal(torch.compile(torch.func.vmap(seen), fullgraph=True, backend="eager")(x), x + 1)
    compiled = torch.compile(seen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x)
    assert torch.equal(torch.func.vmap(compiled)(x), x + 1)
    assert torch.equal(compiled(x), x)


@pytest.mark.usefixtures("_a_capable_machine")
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    current: list[torch.device] = []
    launched = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.device)
        yield
        current.pop()

    def forward(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        launched.append(("forward", *current))
        return torch.empty_like(query)

    def backward(_: object, *tensors: torch.Tensor, **__: object) -> tuple[torch.Tensor | None, ...]:
        launched.append(("backward", *current))
        return *map(torch.empty_like, tensors), None, None

    module = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel_call, "_prepare", lambda operands, **_: (module, {}))
    x = torch.randn(1, 1, 2, 4, requires_grad=True)
    sigmoid_attention(x, x, x).sum().backward()
    assert launched == [("forward", x.device), ("backward", x.device)]
