"""Probes and torch.compile: attached before compilation they record the same, and break no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import probes
import stability
from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig
from probes.record import Record
from stability.attention.compiled import IS_SUPPORTED
from tests.probes.models import SecondHalf

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason=f"needs torch 2.13; this is {torch.__version__}")

TOKENS = torch.arange(10).reshape(2, 5) % 7
SMALL = TokenTransformerConfig(vocabulary=16, max_tokens=8, embed_dim=8, num_layers=2, num_heads=2)


@pytest.fixture(autouse=True)
def compile_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def record(
    make: Callable[[], nn.Module],
    call: Callable[[Any], Tensor],
    compile: Callable[[nn.Module], Any] = lambda model: model,
    *,
    steps: int = 3,
    **arguments: Any,
) -> tuple[probes.Probe, dict[tuple, float]]:
    """Trains for some steps; the probe and what it recorded."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"details_every": 1, "attention_every": 1, "attention_rows": None, **arguments}
    with probes.attach(model, optimizer, **arguments) as probe:
        callable_model = compile(model)
        for _ in range(steps):
            call(callable_model).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe, {name_of(r): r.value for r in probe.records}


def name_of(record: Record) -> tuple:
    return (record.step, *record.series)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


class HandWritten(nn.Module):
    """Attention whose softmax is called as a function, in a module with a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
            x = x + (nn.functional.softmax(heads @ heads.mT, -1) @ heads).transpose(1, 2).flatten(2)
        return x


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = TokenTransformer(SMALL).blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Declared(nn.Module):
    """Sigmoid attention by hand, declared, and a softmax that is not another."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        stability.attention.report_attention(heads, heads, mechanism="sigmoid", bias=-1.0)
        weights = torch.sigmoid(heads @ heads.mT / 2 - 1.0) + torch.softmax(heads @ heads.mT, -1)
        return x + (weights @ heads).transpose(1, 2).flatten(2)


def cells(mechanism: str) -> Callable[[], nn.Module]:
    return lambda: CellTransformer(
        CellTransformerConfig.preset("tiny", num_genes=50, attention=mechanism, checkpoint_attention=False)
    )


def on_cells(model: Any) -> Tensor:
    genes, mask = torch.arange(16).reshape(2, 8), torch.arange(16).reshape(2, 8) % 3 == 0
    return model(genes, genes / 16, mask, torch.tensor([8, 5]))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


INPUT = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], int]] = {
    "scaled_dot_product_attention": (lambda: TokenTransformer(SMALL), lambda model: model(TOKENS), 2),
    "softmax_attention": (cells("softmax"), on_cells, 2),
    "sigmoid_attention": (cells("sigmoid"), on_cells, 2),
    "MultiheadAttention": (encoder, lambda model: model(INPUT), 2),
    "by hand, twice": (HandWritten, lambda model: model(INPUT), 2),
    "declared": (Declared, lambda model: model(INPUT), 1),
    "checkpointed": (Checkpointed, lambda model: model(INPUT), 1),
}


@pytest.mark.parametrize(("make", "call", "num_sites"), MODELS.values(), ids=MODELS)
def test_the_same_is_recorded(
    make: Callable[[], nn.Module], call: Callable[[Any], Tensor], num_sites: int
) -> None:
    eager_probe, eager = record(make, call)
    compiled_probe, seen = record(make, call, compiled)
    assert compiled_probe.attention_sites == eager_probe.attention_sites
    assert len([site for site in compiled_probe.attention_sites if site.unseen is None]) == num_sites
    assert seen.keys() == eager.keys()
    for name, value in seen.items():
        assert value == pytest.approx(eager[name], rel=1e-3, abs=1e-5), name
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("error::probes.ProbeWarning")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor compiles C++
def test_an_output_that_the_loss_does_not_depend_on_costs_no_other_gradient(backend: str) -> None:
    def call(model: Any) -> Tensor:
        return model(INPUT[..., :2])

    def compile(model: nn.Module) -> Any:
        return torch.compile(model, fullgraph=True, backend=backend)

    _, eager = record(SecondHalf, call, attention_every=0)
    _, seen = record(SecondHalf, call, compile, attention_every=0)
    assert seen == pytest.approx(eager, rel=1e-3, abs=1e-5)


@pytest.mark.slow  # compiles C++
def test_the_same_is_recorded_by_inductor() -> None:
    make, call, _ = MODELS["scaled_dot_product_attention"]
    _, eager = record(make, call)
    _, seen = record(make, call, lambda model: torch.compile(model, fullgraph=True))
    assert seen.keys() == eager.keys()
    for name, value in seen.items():
        assert value == pytest.approx(eager[name], rel=1e-3, abs=1e-5), name


def test_steps_that_record_nothing_are_not_compiled_anew() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile(model: nn.Module) -> Any:
        return torch.compile(model, fullgraph=True, backend=backend)

    make, call, _ = MODELS["scaled_dot_product_attention"]
    probe, _ = record(make, call, compile, steps=6, every=2, details_every=4, attention_every=3)
    assert len(graphs) == 1
    steps = {
        q: {r.step for r in probe.records if r.quantity == q} for q in ("grad_norm", "attention/entropy")
    }
    assert steps == {"grad_norm": {0, 2, 4}, "attention/entropy": {0, 3}}


def test_validation_is_not_recorded() -> None:
    make, _, _ = MODELS["scaled_dot_product_attention"]

    def call(model: Any) -> Tensor:
        with torch.no_grad():
            model(TOKENS)
        return model(TOKENS)

    _, eager = record(make, call)
    _, seen = record(make, call, compiled)
    assert seen == pytest.approx(eager, rel=1e-3, abs=1e-5)


def test_blocks_that_are_compiled_apart() -> None:
    make, call, _ = MODELS["scaled_dot_product_attention"]

    def compile_blocks(model: nn.Module) -> nn.Module:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(fullgraph=True, backend="aot_eager")
        return model

    _, eager = record(make, call)
    _, seen = record(make, call, compile_blocks)
    assert seen == pytest.approx(eager, rel=1e-3, abs=1e-5)


def test_what_compiled_code_hides_is_said() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).sigmoid() @ x

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), Attention())

    with pytest.warns(probes.ProbeWarning, match="no attention call of it is known in compiled code"):
        probe, _ = record(make, lambda model: model(INPUT), compiled, attention_every=None)
    (site,) = probe.attention_sites
    assert (site.layer, site.kind) == ("1", "Attention")


def test_layer_jacobians_are_said_to_be_missing() -> None:
    make, call, _ = MODELS["scaled_dot_product_attention"]
    with pytest.warns(probes.ProbeWarning, match="layer Jacobians are not measured in compiled code"):
        record(make, call, compiled, layer_jacobian_every=1)


def test_a_graph_that_breaks_records_the_same() -> None:
    class Broken(TokenTransformer):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.token_embedding(tokens)
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return self.head(self.final_norm(x))

    def make() -> nn.Module:
        return Broken(SMALL)

    _, eager = record(make, lambda model: model(TOKENS))
    _, seen = record(make, lambda model: model(TOKENS), lambda m: torch.compile(m, backend="aot_eager"))
    assert seen == pytest.approx(eager, rel=1e-3, abs=1e-5)


def test_a_closed_probe_leaves_compiled_code_working() -> None:
    model = TokenTransformer(SMALL)
    expected = model(TOKENS)
    with probes.attach(model):
        fast = compiled(model)
        fast(TOKENS).sum().backward()
    torch.testing.assert_close(fast(TOKENS), expected)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)


def test_compiled_before_the_probe_came() -> None:
    model = TokenTransformer(SMALL)
    fast = compiled(model)
    fast(TOKENS).sum().backward()
    with pytest.raises(ValueError, match=r"attach to the model first and compile it then"):
        probes.attach(fast)
    # A compiled function that the probe cannot know of is compiled anew, since there are hooks now.
    with probes.attach(model, details_every=1) as probe:
        fast(TOKENS).sum().backward()
        probe.step()
    assert {r.layer for r in probe.records if r.quantity == "activation_rms"} >= {"blocks.0.mlp.hidden"}
