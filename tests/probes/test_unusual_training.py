"""Trainings that do what few do: each is recorded as the plain one, and goes on as without a probe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import probes
from probes import watch
from probes.failures import ProbeWarning
from tests.probes.models import train_on_ones
from tests.probes.recorded import values_of

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def norm_of(*tensors: Tensor | None) -> float:
    return torch.stack([tensor.norm() for tensor in tensors if tensor is not None]).norm().item()


class Subclass(torch.optim.SGD):
    """Calls a step of torch's from its own, as many do; torch puts hooks around both."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError
        return super().step(closure)


def hooked_twice(model: nn.Module) -> Subclass:
    torch.optim.SGD(model.parameters())  # from now on the class's own step has hooks
    return Subclass(model.parameters(), lr=0.1)


@pytest.mark.parametrize("same_step", [False, True])
def test_an_optimizer_whose_step_calls_that_of_its_base_steps_once(same_step: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = hooked_twice(model)
    with probes.attach(model, optimizer, same_step=same_step, details_every=1) as probe:
        train_on_ones(model, optimizer, 3)
    assert (
        values_of(probe, "grad_norm", "(root)")
        == [pytest.approx(norm_of(model.weight.grad, model.bias.grad))] * 3
    )
    assert [record.step for record in probe.records if record.quantity == "update_ratio"] == [0, 1, 2]


def test_updates_of_such_an_optimizer_are_left_out_once() -> None:
    model = nn.Linear(2, 1)
    optimizer = hooked_twice(model)
    before = model.weight.detach().clone()
    with (
        pytest.warns(probes.DivergenceWarning),
        probes.attach(model, optimizer, same_step=True, on_divergence="skip") as probe,
    ):
        for _ in range(2):
            model(torch.full((2, 2), torch.nan)).sum().backward()
            optimizer.step()
    assert model.weight.equal(before)
    assert values_of(probe, "skipped_step", "(all)") == [1, 1]


def test_a_step_that_failed_and_is_tried_again_is_measured_once() -> None:
    model = nn.Linear(2, 1)
    optimizer = hooked_twice(model)
    with probes.attach(model, optimizer) as probe:
        optimizer.fails = True
        with pytest.raises(MemoryError):
            train_on_ones(model, optimizer)
        optimizer.fails = False
        train_on_ones(model, optimizer)
    expected = norm_of(model.weight.grad, model.bias.grad)
    assert values_of(probe, "grad_norm", "(root)") == [pytest.approx(expected)]


def test_a_step_that_a_users_function_refuses_is_measured_anew() -> None:
    class Refused(Exception):
        pass

    def refuse(alert: object) -> None:
        raise Refused

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, same_step=True, on_divergence=refuse) as probe:
        model(torch.full((2, 2), torch.nan)).sum().backward()
        with pytest.raises(Refused):
            optimizer.step()
        train_on_ones(model, optimizer)
    expected = norm_of(model.weight.grad, model.bias.grad)
    assert values_of(probe, "grad_norm", "(root)")[1:] == [pytest.approx(expected)]


class Spectrum(nn.Module):
    """Complex weights, one of which has no gradient but zero."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(2, 2, dtype=torch.cfloat))
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.cfloat))
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.cfloat) @ self.filter + 0 * self.unused.sum().conj()).abs())


def test_complex_weights_are_pairs_of_real_ones() -> None:
    model = Spectrum()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with probes.attach(model, optimizer, details_every=1) as probe:
        train_on_ones(model, optimizer)
        gradients = [model.filter.grad, model.unused.grad]
        train_on_ones(model, optimizer)
    assert gradients[0] is not None
    assert values_of(probe, "grad_norm", "(root)")[0] == pytest.approx(norm_of(*gradients))
    largest = torch.view_as_real(gradients[0]).abs().max().item()
    assert values_of(probe, "grad_max_abs", "(root)")[0] == pytest.approx(largest)
    assert len(values_of(probe, "update_ratio", "(root)")) == 2
    # Adam's first step divides every real number by itself; of 14, six have a gradient of zero.
    assert values_of(probe, "adam_update_rms", "(root)")[0] == pytest.approx((8 / 14) ** 0.5, rel=1e-3)


def test_a_second_moment_of_another_shape_costs_no_other_record() -> None:
    class Projected(torch.optim.SGD):
        """Keeps Adam's second moment of a projected gradient, as GaLore does."""

        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"step": 1, "exp_avg_sq": torch.ones(3, 5)}
            return super().step(closure)

    model = nn.Linear(2, 1)
    optimizer = Projected(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(betas=(0.9, 0.99), eps=1e-8)
    with probes.attach(model, optimizer, details_every=1) as probe:
        train_on_ones(model, optimizer, 2)
    assert len(values_of(probe, "update_ratio", "(root)")) == 2
    assert values_of(probe, "adam_update_rms", "(root)") == []


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_gain_from_an_input_that_all_micro_batches_share(micro_batches: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.ones(2, 2, requires_grad=True)
    with probes.attach(model, activations_every=1) as probe:
        for _ in range(micro_batches):
            model(x).sum().backward()
        probe.step()
    # d loss / d input over d loss / d output of a linear layer whose two outputs have the same gradient.
    at_output = model[1].weight.detach().expand(2, 2)
    expected = (at_output @ model[0].weight.detach()).norm() / at_output.norm()
    assert values_of(probe, "gradient_gain", "0") == [pytest.approx(expected.item(), rel=1e-5)]


def test_lazy_layers_and_a_log_dir(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, log_dir=tmp_path, flight_recorder=0) as probe:
        train_on_ones(model, optimizer)
    expected = norm_of(model[0].weight.grad, model[0].bias.grad)
    assert values_of(probe, "grad_norm", "0") == [pytest.approx(expected)]


def test_what_python_shows_once_is_shown_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    registry: dict[Any, Any] = {}
    with warnings.catch_warnings(record=True) as shown, probes.attach(model, optimizer):
        warnings.simplefilter("default", FutureWarning)
        for _ in range(25):
            warnings.warn_explicit("of the script", FutureWarning, "script.py", 1, registry=registry)
            train_on_ones(model, optimizer)
    assert len([warning for warning in shown if warning.category is FutureWarning]) == 1


def test_an_interrupted_submodule_does_not_confuse_the_steps_after() -> None:
    class Interrupted(nn.Linear):
        is_due = False

        def forward(self, x: Tensor) -> Tensor:
            if self.is_due:
                raise KeyboardInterrupt
            return super().forward(x)

    model = nn.ModuleDict({"encoder": nn.Sequential(Interrupted(2, 2)), "decoder": nn.Linear(2, 1)})
    encoder: Any = model["encoder"][0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, activations_every=1) as probe:
        encoder.is_due = True
        with pytest.raises(KeyboardInterrupt):
            model["encoder"](torch.ones(2, 2))
        encoder.is_due = False
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                model["decoder"](model["encoder"](torch.ones(2, 2))).sum().backward()
            optimizer.step()
    assert {record.call for record in probe.records if record.step > 0} == {0}


def test_a_whole_model_under_reentrant_checkpointing_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer) as probe:  # without a warning
        checkpoint(model, torch.ones(2, 2, requires_grad=True), use_reentrant=True).sum().backward()
        optimizer.step()
    assert len(values_of(probe, "activation_rms", "1")) == 1


def test_forward_passes_after_which_no_optimizer_steps_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "MAX_CALLS", 100)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, activations_every=1) as probe:
        with pytest.warns(ProbeWarning, match="attach with the new one") as caught:
            for _ in range(200):
                model(torch.ones(2, 2)).sum().backward()
        assert len(caught) == 1
        assert probe._watch.pending.size < 500
        train_on_ones(model, optimizer, 2)
    assert [r.step for r in probe.records if (r.quantity, r.layer) == ("activation_rms", "1")] == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_exits_writes_nothing(tmp_path: Path) -> None:
    script = f"""
import os, sys, torch, probes
from probes.sinks import JsonLinesSink

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = probes.attach(model, optimizer, sinks=[JsonLinesSink({str(tmp_path / "run.jsonl")!r})])
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    counts = Counter((line.get("step"), line.get("layer"), line.get("quantity")) for line in lines)
    assert counts[2, "(all)", "grad_norm"] == 1
    assert set(counts.values()) == {1}


def test_torch_calls_the_argument_of_softmax_by_other_names_too() -> None:
    logits = torch.randn(2, 3)
    expected = torch.softmax(logits, -1)
    with probes.attach(nn.Linear(2, 1)):
        named: Any = torch.softmax
        assert named(x=logits, axis=-1).equal(expected)


def test_an_optimizer_that_is_replaced_is_told_of_at_the_second_step_of_the_other() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer):
        train_on_ones(model, optimizer, 3)
        other = torch.optim.Adam([*model[0].parameters()])
        train_on_ones(model, other)
        with pytest.warns(ProbeWarning, match=r"step 3 does not end: the SGD .* Adam, steps over the same"):
            train_on_ones(model, other)
        train_on_ones(model, other)  # once


def test_an_optimizer_of_several_that_is_replaced_is_told_of_while_others_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    first, second, other = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 1, 1))
    with probes.attach(model, [first, second]):
        for _ in range(2):
            train_on_ones(model, first)
            train_on_ones(model, second)
        train_on_ones(model, first)
        train_on_ones(model, other)
        train_on_ones(model, first)
        with pytest.warns(ProbeWarning, match="step 2 does not end"):
            train_on_ones(model, other)


def test_optimizers_that_step_beside_the_watched_one_are_no_replacement() -> None:
    """Turns over the same parameters, steps within steps, other parameters; steps skipped or late."""
    model, critic = nn.Linear(2, 1), nn.Linear(2, 1)
    watched, turns = torch.optim.SGD(model.parameters(), lr=0.1), hooked_twice(model)
    disjoint = torch.optim.Adam(critic.parameters())

    class Outer(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            return watched.step(closure)

    outer = Outer(model.parameters(), {})
    outermost = Outer(model.parameters(), {})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with probes.attach(model, watched) as probe:
        for _ in range(3):
            train_on_ones(model, watched)
            train_on_ones(model, turns)
            train_on_ones(model, outer)
            train_on_ones(model, outermost)
            train_on_ones(critic, disjoint, 2)
            for _ in range(3):  # accumulated
                model(torch.ones(2, 2)).sum().backward()
            scaler.scale(model(torch.full((2, 2), torch.inf)).sum()).backward()
            scaler.step(watched)
            scaler.update()
    assert probe._watch.step == 12


def test_an_optimizer_that_steps_by_several_steps_of_another_is_not_replaced() -> None:
    model = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    class Twice(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            inner.step(closure)
            return inner.step(closure)

    optimizer = Twice(model.parameters(), {})
    with probes.attach(model, optimizer) as probe:
        train_on_ones(model, optimizer, 3)
    assert probe._watch.step == 3


def test_parameters_that_came_after_the_probe_are_told_of_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, details_every=2) as probe:
        train_on_ones(model, optimizer, 1)
        model[1] = nn.Linear(2, 1)  # a new head
        optimizer.add_param_group({"params": [*model[1].parameters()]})
        with pytest.warns(ProbeWarning, match=r"attached: 1\.weight and 1 more\. They are not") as caught:
            train_on_ones(model, optimizer, 4)
        assert len(caught) == 1
    assert {record.step for record in probe.records if record.quantity == "grad_norm"} == set(range(5))
