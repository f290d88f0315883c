"""What training scripts do every day, and a probe has to go along with."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import probes
from probes.failures import ProbeWarning
from tests.probes.lifecycle import assert_nothing_is_left
from tests.probes.models import train_on_ones
from tests.probes.recorded import values_of

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def test_a_disabled_grad_scaler() -> None:
    """What `GradScaler(enabled=use_amp)` is on a machine without a GPU, or under bfloat16."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with probes.attach(model, optimizer) as probe:
        scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert values_of(probe, "grad_norm", "(root)") == [5.0]
    assert values_of(probe, "skipped_step", "(all)") == []


class Checkpointed(nn.Module):
    """Layers that are checkpointed one by one."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.use_reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_checkpointed_layers_are_in_the_order_of_the_forward_pass(
    use_reentrant: bool, same_step: bool
) -> None:
    """Reentrant checkpointing shows gradients only in the backward pass, the last layer first."""
    orders, outputs = [], []
    for checkpointing in (None, use_reentrant):
        torch.manual_seed(0)
        model = Checkpointed(checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probes.attach(model, optimizer, same_step=same_step) as probe:
            with torch.no_grad():
                model(torch.ones(2, 2))  # a look at the model before it trains
            for _ in range(2):
                optimizer.zero_grad()
                for _ in range(2):
                    model(torch.ones(2, 2)).sum().backward()
                optimizer.step()
        orders.append(probe.state_dict()["layers"])
        outputs.append({(r.step, r.layer, r.call): r.value for r in probe.records if "rms" in r.quantity})
    assert orders[0] == orders[1]
    assert orders[0][:3] == ["first", "layers.0.0", "layers.0.1"]
    assert outputs[0] == outputs[1]


def test_an_explosion_behind_reentrant_checkpointing_is_named_where_it_began() -> None:
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    factor = 1.0
    middle = model.layers[2]
    assert isinstance(middle, nn.Sequential)

    def amplify(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

    middle[0].register_forward_hook(amplify)
    with probes.attach(model, optimizer, on_divergence="ignore") as probe:
        train_on_ones(model, optimizer, 40)
        factor = 1e8
        train_on_ones(model, optimizer, 2)
    assert probe.alerts[0].layer == "layers.2.0"  # and not the first that the gradient reached from there


def test_gradients_of_single_samples_by_vmap() -> None:
    """Differential privacy, influence functions: the mapped passes are left out, all else is recorded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(4, 2)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample,)).sum()

    with probes.attach(model, optimizer, activations_every=1, details_every=1) as probe:
        for step in range(2):
            with torch.no_grad():
                vmap(loss, (None, 0))(dict(model.named_parameters()), x)
            if step == 0:
                with pytest.warns(ProbeWarning, match=r"runs under torch\.vmap") as caught:
                    of_samples = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
                assert len(caught) == 1
            else:
                of_samples = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
            model(x).sum().backward()  # what the step is about
            for name, parameter in model.named_parameters():
                parameter.grad = of_samples[name].sum(0)
            expected = torch.stack([of_samples[f"0.{name}"].sum(0).norm() for name in ("weight", "bias")])
            optimizer.step()
            optimizer.zero_grad()
    assert values_of(probe, "grad_norm", "0")[1] == pytest.approx(expected.norm().item())
    assert len(values_of(probe, "activation_rms", "0")) == 2
    assert len(values_of(probe, "activation_grad_norm", "0")) == 2


def test_mapped_attention_is_left_out() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(3, 2, 4, 8)
    with probes.attach(model, optimizer, attention_every=1) as probe:
        with pytest.warns(ProbeWarning, match=r"runs under torch\.vmap"):
            vmap(model)(x)
        model(x[0]).sum().backward()
        optimizer.step()
    entropies = [r for r in probe.records if r.quantity == "attention/entropy" and r.head is None]
    assert [(r.layer, r.call) for r in entropies] == [("self_attn", 0)]


def test_an_optimizer_over_parameters_that_came_later_is_told_of() -> None:
    """Adapters, and layers that were made anew: nothing that the watched optimizer holds is trained."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, details_every=0):
        train_on_ones(model, optimizer, 2)
        model[0].requires_grad_(False)
        model[1] = nn.Linear(2, 1)
        other = torch.optim.Adam(model[1].parameters())
        train_on_ones(model, other)
        with pytest.warns(
            ProbeWarning, match=r"step 2 does not end.* that the model has got since"
        ) as caught:
            train_on_ones(model, other)
        train_on_ones(model, other)
        assert len(caught) == 1


def test_optimizers_that_were_not_given_and_those_beside_are_no_replacement() -> None:
    model, critic = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.Linear(2, 1)
    watched, left_out = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    with probes.attach(model, watched, details_every=0) as probe:
        train_on_ones(model, left_out, 3)
        train_on_ones(critic, torch.optim.SGD(critic.parameters(), lr=0.1), 3)
        model.append(nn.Linear(1, 1))
        beside = torch.optim.SGD(model[2].parameters(), lr=0.1)
        for _ in range(3):
            train_on_ones(model, watched)
            train_on_ones(model, beside)
    assert probe._watch.step == 3


@pytest.fixture
def compiler() -> Iterator[None]:
    """Leaves nothing compiled or counted behind."""
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("same_step", [False, True])
def test_a_compiled_optimizer_step(tmp_path: Path, same_step: bool) -> None:
    """What a probe does around it is not traced: a flight recorder cannot be."""
    recorded: list[set[tuple]] = []
    weights = []
    for is_watched, is_compiled in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        with ExitStack() as stack:
            if is_watched:
                log_dir = tmp_path / str(is_compiled)
                probe = probes.attach(model, optimizer, log_dir=log_dir, details_every=1, same_step=same_step)
                stack.enter_context(probe)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 2)).sum().backward()
                step()
        if is_watched:
            recorded.append({(r.step, r.layer, r.quantity) for r in probe.records})
        weights.append(model.weight)
    assert recorded[0] == recorded[1]
    assert weights[0].equal(weights[1])


def test_a_probe_that_is_closed_on_another_thread_and_in_another_task(tmp_path: Path) -> None:
    """Trainings behind a web page or in a notebook's task; every probe that is closed at exit."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began: list[probes.Probe] = []

    def begin() -> None:
        began.append(probes.attach(model, optimizer, log_dir=tmp_path / str(len(began))))
        model(torch.ones(2, 3, 8)).sum().backward()
        optimizer.step()

    async def begin_in_a_task() -> None:
        begin()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    began[0].close()
    asyncio.run(begin_in_a_task())
    began[1].close()
    for index in range(2):
        assert probes.read(tmp_path / str(index))["grad_norm/(all)"].steps.tolist() == [0]
    assert_nothing_is_left(model, optimizer)


def test_letting_go_of_the_model_fails() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = probes.attach(model, optimizer)
    probe.on_close([].pop)
    train_on_ones(model, optimizer)
    with pytest.warns(ProbeWarning, match=r"letting go of the model failed.*IndexError") as caught:
        probe.close()
    assert caught[0].filename == __file__
    assert len(values_of(probe, "grad_norm", "(root)")) == 1
    assert_nothing_is_left(model, optimizer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_trains_writes_nothing_among_what_its_parent_records(tmp_path: Path) -> None:
    script = f"""
import os, sys, torch, probes
from probes.sinks import JsonLinesSink

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def train(factor):
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.ones(2, 2)).sum() * factor).backward()
        optimizer.step()

place = {str(tmp_path)!r}
sinks = [JsonLinesSink(f"{{place}}/run.jsonl")]
with probes.attach(model, optimizer, log_dir=place, sinks=sinks):
    train(1)
    child = os.fork()
    if child == 0:
        train(7)
        train(float("nan"))
        sys.exit()
    os.waitpid(child, 0)
    train(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    for place in ("run.jsonl", "flight_recorder.bin", "."):
        norms = probes.read(tmp_path / place)["grad_norm/(all)"]
        assert norms.steps.tolist() == list(range(6))
        assert norms.values.tolist() == [pytest.approx(12**0.5)] * 6
    assert (tmp_path / "run.jsonl").read_text().count('"(all)"') == 6
    assert not (tmp_path / "incidents").exists()
