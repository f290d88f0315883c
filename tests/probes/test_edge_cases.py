"""Training loops that are not the textbook's."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes
from probes.sinks import JsonLinesSink
from stability.divergence import GradientExplosionDetector, NonFiniteDetector
from tests.probes.models import SelfAttention, torch_attention
from tests.probes.test_recorded_values import values_of

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def test_submodules_called_without_the_model_are_counted_from_zero() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with probes.attach(model, activations_every=1) as probe:
        for _ in range(3):
            model["decoder"](model["encoder"](torch.rand(1, 2))).sum().backward()
            probe.step()
    assert {record.call for record in probe.records} == {0}
    assert len(values_of(probe, "activation_rms", "encoder")) == 3


def test_hooks_on_parameters_and_inputs_do_not_pile_up() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 2))

        def forward(self) -> Tensor:
            return self.table

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()
            self.head = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.positions())

    model, x = Model(), torch.rand(3, 2, requires_grad=True)
    with probes.attach(model, activations_every=1) as probe:
        for _ in range(4):
            model(x).sum().backward()
            probe.step()
    norms = values_of(probe, "activation_grad_norm", "positions")
    assert norms == [pytest.approx(norms[0])] * 4
    assert not model.positions.table._backward_hooks
    assert not x._backward_hooks


@pytest.mark.filterwarnings("ignore::probes.DivergenceWarning")
def test_the_origin_of_an_explosion_does_not_depend_on_parameter_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": decayed}, {"params": others}], lr=0.0)
    detector = GradientExplosionDetector(min_history=3)
    with probes.attach(model, optimizer, detectors=[detector]) as probe:
        for step in range(6):
            (model(torch.rand(8, 4)).square().sum() * (1e6 if step == 5 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [alert.layer for alert in probe.alerts] == ["2"]


@pytest.mark.filterwarnings("ignore::probes.DivergenceWarning")
def test_the_origin_of_a_nan_does_not_depend_on_dtypes() -> None:
    class Break(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() * self.weight * math.nan

    model = nn.Sequential(nn.Linear(4, 4), Break(), nn.Linear(4, 1))
    with probes.attach(model) as probe:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.rand(2, 4)).sum()
        loss.backward()
        probe.step()
    assert [alert.layer for alert in probe.alerts] == ["1"]
    measured = [r.layer for r in probe.records if r.quantity == "activation_max_abs"]
    assert measured == ["0", "1", "2"]


def test_the_gain_is_that_of_calls_whose_input_has_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    data, generated = torch.rand(5, 3), torch.rand(5, 3, requires_grad=True)
    with probes.attach(model) as probe:
        model(data).sum().backward()  # no gradient at the input
        model(generated).sum().backward()
        probe.step()
    expected = generated.grad.norm() / math.sqrt(15)
    assert values_of(probe, "gradient_gain", "0") == [pytest.approx(expected.item())]


def test_of_a_critic_that_steps_several_times_the_first_step_counts() -> None:
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
    critic, generator = (torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model)
    with probes.attach(model, [critic, generator]) as probe:
        for _ in range(5):
            model[0](torch.ones(1, 2)).sum().backward()
            critic.step()
            critic.zero_grad()
        model[1](torch.ones(1, 2)).sum().backward()
        generator.step()
    assert values_of(probe, "grad_norm", "0") == [pytest.approx(math.sqrt(2))]
    assert values_of(probe, "weight_norm", "0") == [pytest.approx(model[0].weight.norm().item())]
    with pytest.raises(ValueError, match="names one optimizer twice"):
        probes.attach(model, [critic, critic])


def test_a_fused_step_unscales_and_so_does_the_record() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.attach(model, optimizer) as probe:
        scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert values_of(probe, "grad_norm", "(root)") == [pytest.approx(5.0)]
    assert values_of(probe, "grad_max_abs", "(root)") == [pytest.approx(4.0)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_marked_and_no_divergence(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.attach(model, optimizer, activations_every=1) as probe:
        for factor in (1.0, math.inf, 1.0):
            scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert values_of(probe, "skipped_step", "(all)") == [0.0, 1.0, 0.0]
    assert values_of(probe, "grad_norm", "0") == [5.0, math.inf, 5.0]
    assert values_of(probe, "activation_grad_norm", "0") == [1.0, math.inf, 1.0]  # not of the scaled loss
    assert probe.alerts == []
    assert torch.amp.GradScaler.step.__qualname__ == "GradScaler.step"
    assert not hasattr(torch.amp.GradScaler.step, "__wrapped__")


def test_another_models_scaler_changes_nothing() -> None:
    watched, other = nn.Sequential(nn.Linear(2, 1, bias=False)), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(watched.parameters(), lr=0.1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with probes.attach(watched, optimizer) as probe:
        scaler.scale(other(torch.ones(1, 2)).sum()).backward()
        watched(torch.tensor([[3.0, 4.0]])).sum().backward()
        scaler.step(others)
        optimizer.step()
    assert values_of(probe, "activation_grad_norm", "0") == [1.0]
    assert values_of(probe, "skipped_step", "(all)") == []


def test_a_model_called_by_its_forward_method_is_said_to_be_unseen() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(probes.ProbeWarning, match="no forward pass of the model was seen in step 0") as caught:
        with probes.attach(model, optimizer, activations_every=1) as probe:
            for _ in range(2):
                model.forward(torch.ones(1, 2)).sum().backward()
                optimizer.step()
    assert len(caught) == 1
    assert len(values_of(probe, "grad_norm", "(root)")) == 2


def test_weights_that_are_not_finite_are_a_divergence_though_steps_are_skipped() -> None:
    skipped = {"skipped_step": {"(all)": 1.0}, "grad_norm": {"a": math.nan}, "activation_rms": {"a": 1.0}}
    assert NonFiniteDetector().update(0, skipped) == []
    assert len(NonFiniteDetector().update(0, {**skipped, "activation_rms": {"a": math.nan}})) == 1


def test_rows_without_keys_are_no_divergence() -> None:
    assert NonFiniteDetector().update(0, {"attention/max_logit": {"a": -math.inf}}) == []


def test_steps_without_a_finite_gradient_do_not_end_an_episode() -> None:
    detector = GradientExplosionDetector(min_history=2)
    norms = [1.0, 1.0, 5e4, math.inf, 5e4, math.nan, 5e4]
    alerts = [len(detector.update(i, {"grad_norm": {"a": norm}})) for i, norm in enumerate(norms)]
    assert alerts == [0, 0, 1, 0, 0, 0, 0]


def test_a_running_loss_is_recorded_as_it_was() -> None:
    total = torch.zeros(())
    with probes.attach(nn.Linear(1, 1)) as probe:
        total += 5.0
        probe.log(total=total)
        total.zero_()
        probe.step()
    assert values_of(probe, "total", "(all)") == [5.0]


def test_a_json_lines_file_cut_short_is_continued(tmp_path: Path) -> None:
    path, model = tmp_path / "run.jsonl", nn.Linear(1, 1)
    for resumed in (False, True):
        with probes.attach(model, sinks=[JsonLinesSink(path)], activations_every=1) as probe:
            if resumed:
                probe.load_state_dict({**probe.state_dict(), "step": 2})
            for _ in range(2):
                model(torch.ones(1, 1)).sum().backward()
                probe.step()
        if not resumed:
            path.write_bytes(path.read_bytes()[:-20])
    assert probes.read(path)["activation_rms/(root)"].steps.tolist() == [0, 1, 2, 3]


def test_batches_measured_whole_and_by_sample_are_one_series() -> None:
    model = SelfAttention(torch_attention)
    with probes.attach(model, attention_every=1, attention_rows=8) as probe:
        for tokens in (4, 30):
            model(torch.rand(1, tokens, 16)).sum().backward()
        probe.step()
    (record,) = [r for r in probe.records if r.quantity == "attention/max_logit" and r.head is None]
    assert record.kind == "lower_bound"


def test_the_whole_model_is_the_whole_model_and_thawed_layers_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    with probes.attach(model, layers="1") as narrow:
        model[0].requires_grad_(True)
        model(torch.ones(1, 2)).sum().backward()
        narrow.step()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert values_of(narrow, "grad_norm", "(all)") == [pytest.approx(total)]
    assert {r.layer for r in narrow.records if r.quantity == "grad_norm"} == {"1", "(all)"}


def test_a_weight_that_breaks_is_named_at_its_own_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, on_divergence="ignore") as probe:
        for step in range(4):
            if step == 3:
                with torch.no_grad():
                    model[1].weight[0, 0] = math.nan
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (alert,) = probe.alerts
    assert (alert.step, alert.layer, alert.quantity) == (3, "1", "weight_norm")


def test_weights_are_measured_before_the_step_and_without_an_optimizer_too() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.norm().item()
    with probes.attach(model, optimizer) as probe:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    after = model.weight.norm().item()
    with probes.attach(model) as by_hand:
        model(torch.ones(1, 2)).sum().backward()
        by_hand.step()
    assert values_of(probe, "weight_norm", "(root)") == [pytest.approx(before)]
    assert values_of(by_hand, "weight_norm", "(root)") == [pytest.approx(after)]


def test_a_closure_without_gradients_before_it_records_weights_and_updates() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with probes.attach(model, optimizer) as probe:
        optimizer.zero_grad()
        optimizer.step(closure)
    assert len(values_of(probe, "weight_norm", "(root)")) == 1
    assert values_of(probe, "update_ratio", "(root)")[0] > 0


def test_closing_lets_go_of_the_model() -> None:
    model = nn.Linear(2, 1)
    probe = probes.attach(model)
    model(torch.ones(1, 2)).sum().backward()
    probe.step()
    probe.close()
    alive = weakref.ref(model)
    del model, probe
    gc.collect()
    assert alive() is None


def test_state_taken_for_a_checkpoint_includes_the_last_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    detector = GradientExplosionDetector()
    with probes.attach(model, optimizer, detectors=[detector]) as probe:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        state = probe.state_dict()
    (_, detector_state) = state["detectors"][0]
    assert state["step"] == 3
    assert len(detector_state["tracks"]["(root)"]["range"]) == 3


def test_the_order_of_layers_goes_with_the_checkpoint() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    class Order:
        seen: tuple[str, ...] = ()

        def update(self, step: int, readings: Any) -> list[Any]:
            self.seen = tuple(readings["grad_norm"])
            return []

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def one_step(probe: probes.Probe) -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with probes.attach(model, optimizer, detectors=[Order()]) as probe:
        one_step(probe)
        state = probe.state_dict()
    detector = Order()
    with probes.attach(model, optimizer, detectors=[detector]) as probe:
        probe.load_state_dict(state | {"step": 1})  # a step that measures no outputs
        one_step(probe)
    assert detector.seen.index("first") < detector.seen.index("second")


def test_attention_may_come_in_a_later_phase_of_the_step() -> None:
    model = nn.ModuleDict({"critic": nn.Linear(16, 1), "generator": SelfAttention(torch_attention)})
    critic, generator = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model.values())
    with probes.attach(model, [critic, generator], attention_every=1) as probe:
        x = torch.rand(1, 3, 16)
        with torch.no_grad():
            generated = model["generator"](x)
        model["critic"](generated).sum().backward()
        critic.step()
        model["critic"](model["generator"](x)).sum().backward()
        generator.step()
    assert [site.layer for site in probe.attention_sites] == ["generator"]
