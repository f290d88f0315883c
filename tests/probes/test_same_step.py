"""Verdicts before the update: raising, skipping and restoring, and a training that none of them changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes
from probes import transfer
from stability.divergence import Alert, NonFiniteDetector

Optimizers = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizers] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
    "adam, one by one": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True, foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
}


class Training:
    """Six steps of a small model with batch norm, of which some have a batch that is NaN."""

    def __init__(self, optimizer: str = "adamw", **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.arguments = {"detectors": [NonFiniteDetector()], **arguments}
        self.weights: list[list[Tensor]] = []

    def run(self, steps: int, bad: tuple[int, ...] = (), *, is_watched: bool = True) -> probes.Probe | None:
        probe = probes.attach(self.model, self.optimizer, **self.arguments) if is_watched else None
        try:
            for step in range(steps):
                x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
                self.optimizer.zero_grad()
                loss = self.model(x * math.nan if step in bad else x).square().mean()
                loss.backward()
                self.weights.append([p.detach().clone() for p in self.model.parameters()])
                self.optimizer.step()
                self.scheduler.step()
        finally:
            if probe is not None:
                probe.close()
        self.weights.append([p.detach().clone() for p in self.model.parameters()])
        return probe


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on_divergence", ["raise", "skip", "restore"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_divergence_nothing_changes(optimizer: str, on_divergence: str) -> None:
    plain, judged = Training(optimizer), Training(optimizer, same_step=True, on_divergence=on_divergence)
    plain.run(6, is_watched=False)
    judged.run(6)
    assert_equal(plain.weights[-1], judged.weights[-1])
    states = (plain.optimizer.state_dict(), judged.optimizer.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_raise_comes_before_the_update() -> None:
    training = Training(same_step=True, on_divergence="raise")
    with pytest.raises(probes.DivergenceError, match=r"step 2: .*\(seen before the update\)") as caught:
        training.run(6, bad=(2,))
    assert caught.value.alert.step == 2
    assert_equal(training.weights[2], list(training.model.parameters()))


def test_a_script_that_catches_the_error_does_the_step_again() -> None:
    training = Training(same_step=True, on_divergence="raise")
    with probes.attach(training.model, training.optimizer, **training.arguments) as probe:
        for bad in (False, True, False):
            training.optimizer.zero_grad()
            x = torch.full((1, 4), math.nan if bad else 1.0)
            training.model(x).sum().backward()
            if bad:
                with pytest.raises(probes.DivergenceError):
                    training.optimizer.step()
            else:
                training.optimizer.step()
    values = [r.value for r in probe.records if (r.step, r.layer, r.quantity) == (1, "0", "grad_norm")]
    assert math.isnan(values[0])
    assert math.isfinite(values[1])
    assert len(values) == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_never_was(optimizer: str) -> None:
    """Weights, moments, step counts and weight decay are those of a training without that step."""
    skipping = Training(optimizer, same_step=True, on_divergence="skip")
    with pytest.warns(probes.DivergenceWarning, match="seen before the update"):
        skipping.run(6, bad=(3,))
    assert_equal(skipping.weights[3], skipping.weights[4])

    reference = Training(optimizer)
    for step in range(6):
        reference.optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        reference.model(x).square().mean().backward()
        if step != 3:
            reference.optimizer.step()
        reference.scheduler.step()
    assert_equal(skipping.weights[-1], list(reference.model.parameters()))
    states = (skipping.optimizer.state_dict(), reference.optimizer.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_the_very_first_step_can_be_skipped() -> None:
    training = Training(same_step=True, on_divergence="skip")
    with pytest.warns(probes.DivergenceWarning):
        training.run(3, bad=(0,))
    assert_equal(training.weights[0], training.weights[1])
    assert all(weight.isfinite().all() for weight in training.weights[-1])


def test_the_script_finds_its_gradients_after_a_skipped_update() -> None:
    training = Training(same_step=True, on_divergence="skip")
    with probes.attach(training.model, training.optimizer, **training.arguments):
        training.model(torch.full((1, 4), math.nan)).sum().backward()
        gradients = [parameter.grad for parameter in training.model.parameters()]
        with pytest.warns(probes.DivergenceWarning):
            training.optimizer.step()
        assert all(p.grad is g for p, g in zip(training.model.parameters(), gradients, strict=True))


def test_every_bad_step_is_skipped_and_told() -> None:
    training = Training(same_step=True, on_divergence="skip")
    with pytest.warns(probes.DivergenceWarning):
        probe = training.run(8, bad=(2, 3, 5))
    assert [alert.step for alert in probe.alerts] == [2, 3, 5]
    skipped = [record.step for record in probe.records if record.quantity == "skipped_step"]
    assert skipped == [2, 3, 5]
    assert all(weight.isfinite().all() for weight in training.weights[-1])


def test_skipping_that_does_not_help_raises() -> None:
    training = Training(same_step=True, on_divergence="skip")
    with pytest.warns(probes.DivergenceWarning):
        with pytest.raises(probes.DivergenceError, match="10 updates in a row were left out"):
            training.run(30, bad=tuple(range(5, 30)))
    assert len(training.weights) == 5 + 10 + 1


def test_a_warning_skips_nothing() -> None:
    class Careful(NonFiniteDetector):
        def update(self, step: int, readings: object) -> list[Alert]:
            return [Alert(step, "0", "grad_norm", "warning", 1.0, None, "careful.")]

    plain, judged = Training(), Training(same_step=True, on_divergence="skip", detectors=[Careful()])
    plain.run(4, is_watched=False)
    with pytest.warns(probes.DivergenceWarning):
        judged.run(4)
    assert_equal(plain.weights[-1], judged.weights[-1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restore_goes_back_to_the_last_good_snapshot(optimizer: str) -> None:
    training = Training(optimizer, same_step=True, on_divergence="restore", snapshot_every=4)
    states: list[dict[str, Any]] = []
    training.optimizer.register_step_pre_hook(
        lambda *_: states.append(copy.deepcopy(training.optimizer.state_dict()["state"]))
    )
    with pytest.warns(probes.DivergenceWarning):
        training.run(7, bad=(6,))
    # Snapshots are those before the updates of steps 0 and 4.
    assert_equal(training.weights[4], training.weights[-1])
    torch.testing.assert_close(training.optimizer.state_dict()["state"], states[4], rtol=0, atol=0)
    assert training.optimizer.param_groups[0]["lr"] == training.scheduler.get_last_lr()[0]


def test_restore_leaves_out_a_snapshot_that_is_younger_than_the_fault() -> None:
    class Late(NonFiniteDetector):
        def update(self, step: int, readings: object) -> list[Alert]:
            if step != 6:
                return []
            return [Alert(6, "0", "weight_norm", "divergence", 1.0, None, "since long.", onset_step=3)]

    training = Training(same_step=True, on_divergence="restore", snapshot_every=2, detectors=[Late()])
    with pytest.warns(probes.DivergenceWarning):
        training.run(7)
    # Steps 2 and 4 are the last two snapshots; 4 came after the onset.
    assert_equal(training.weights[2], training.weights[-1])


def test_going_back_is_no_fault() -> None:
    """Weights that come back from a hundred updates away have not jumped, nor has the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with (
        pytest.warns(probes.DivergenceWarning),
        probes.attach(model, optimizer, same_step=True, on_divergence="restore") as probe,
    ):
        for step in range(80):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8) * (math.nan if step in (63, 64) else 1.0)).square().mean()
            probe.log(loss=loss)
            loss.backward()
            optimizer.step()
    assert [(alert.step, alert.kind) for alert in probe.alerts] == [(63, "non-finite"), (64, "non-finite")]


def test_restore_before_any_state_was_there() -> None:
    training = Training(same_step=True, on_divergence="restore", snapshot_every=100)
    with pytest.warns(probes.DivergenceWarning):
        training.run(4, bad=(3,))
    assert_equal(training.weights[0], training.weights[-1])
    assert not training.optimizer.state


def test_buffers_go_back_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"same_step": True, "on_divergence": "restore", "detectors": [NonFiniteDetector()]}
    with probes.attach(model, optimizer, **arguments):
        for value in (1.0, math.nan):
            optimizer.zero_grad()
            model(torch.randn(4, 2) * value).square().sum().backward()
            if math.isnan(value):
                assert model[1].running_mean.isnan().any()
                with pytest.warns(probes.DivergenceWarning):
                    optimizer.step()
            else:
                optimizer.step()
    assert model[1].running_mean.isfinite().all()
    assert model[1].num_batches_tracked == 1


def test_for_the_detectors_a_skipped_step_never_was() -> None:
    class Remembering:
        def __init__(self) -> None:
            self.norms: list[float] = []

        def update(self, step: int, readings: Any) -> list[Alert]:
            self.norms.append(readings["grad_norm"]["0"])
            is_broken = not math.isfinite(self.norms[-1])
            return [Alert(step, "0", "grad_norm", "divergence", 1.0, None, "broken.")] if is_broken else []

        def state_dict(self) -> dict[str, Any]:
            return {"norms": list(self.norms)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.norms = state["norms"]

    detector = Remembering()
    bad = (2, 3, 7, 8, 16, 17, 18, 33, 39)
    with pytest.warns(probes.DivergenceWarning):
        probe = Training(same_step=True, on_divergence="skip", detectors=[detector]).run(40, bad=bad)
    assert [alert.step for alert in probe.alerts] == list(bad)
    norms = [r.value for r in probe.records if (r.layer, r.quantity) == ("0", "grad_norm")]
    assert detector.norms == [norm for norm in norms if math.isfinite(norm)]
    assert len(detector.norms) == 40 - len(bad)


def test_what_is_measured_after_the_update_is_judged_with_the_next_step() -> None:
    seen: dict[int, set[str]] = {}

    class Listener(NonFiniteDetector):
        def update(self, step: int, readings: Any) -> list[Alert]:
            seen[step] = set(readings)
            return []

    training = Training(same_step=True, on_divergence="warn", detectors=[Listener()], details_every=2)
    probe = training.run(4)
    assert {"update_ratio", "adam_update_rms"} <= seen[1] & seen[3]
    assert not {"update_ratio", "adam_update_rms"} & (seen[0] | seen[2])
    assert all({"grad_norm", "weight_norm"} <= seen[step] for step in range(4))
    late = Training(on_divergence="warn", detectors=[], details_every=2).run(4)
    assert sorted(map(repr, probe.records)) == sorted(map(repr, late.records))


def test_one_copy_a_step_where_nothing_is_measured_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    original = transfer._copy_to_host
    monkeypatch.setattr(transfer, "_copy_to_host", lambda *a: (copies.append(1), original(*a))[1])
    Training(same_step=True, details_every=0).run(5)
    assert len(copies) == 5


def test_with_a_grad_scaler() -> None:
    """What the scaler leaves out itself is recorded as ever; the steps it lets through are judged."""
    training = Training(same_step=True, on_divergence="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with probes.attach(training.model, training.optimizer, **training.arguments) as probe:
        for value in (1.0, math.nan, 1.0):
            training.optimizer.zero_grad()
            scaler.scale(training.model(torch.full((1, 4), value)).sum()).backward()
            scaler.step(training.optimizer)
            scaler.update()
    skipped = {record.step: record.value for record in probe.records if record.quantity == "skipped_step"}
    assert skipped == {0: 0.0, 1: 1.0, 2: 0.0}
    assert {record.step for record in probe.records if record.quantity == "grad_norm"} == {0, 1, 2}


def test_a_closure_comes_too_late_and_says_so() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).square().sum()
        loss.backward()
        return loss

    with pytest.warns(probes.ProbeWarning, match=r"no effect with optimizer\.step\(closure\)") as caught:
        with probes.attach(model, optimizer, same_step=True, detectors=[]) as probe:
            for _ in range(3):
                optimizer.step(closure)
    assert len(caught) == 1
    assert {record.step for record in probe.records} == {0, 1, 2}


def test_the_report_of_an_incident_holds_the_step_itself(tmp_path: Path) -> None:
    training = Training(same_step=True, on_divergence="raise", log_dir=tmp_path)
    with pytest.raises(probes.DivergenceError, match=r"report\.html"):
        training.run(6, bad=(4,))
    (folder,) = (tmp_path / "incidents").iterdir()
    assert probes.read(folder / "series.npz")["grad_norm/0"].steps[-1] == 4


@pytest.mark.parametrize("on_divergence", ["skip", "restore"])
def test_skip_and_restore_need_same_step(on_divergence: str) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f'"{on_divergence}" must act before .* add same_step=True'):
        probes.attach(model, optimizer, on_divergence=on_divergence)


def test_same_step_takes_one_optimizer() -> None:
    model = nn.Linear(1, 1)
    two = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    with pytest.raises(ValueError, match="got 2 optimizers"):
        probes.attach(model, two, same_step=True)
    with pytest.raises(ValueError, match="got 0 optimizers"):
        probes.attach(model, same_step=True)


def test_a_snapshot_period_of_zero() -> None:
    with pytest.raises(ValueError, match="`snapshot_every` must be at least 1; got 0"):
        probes.attach(nn.Linear(1, 1), snapshot_every=0)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_skipping_on_a_gpu(fused: bool) -> None:
    def train(bad: int | None, skipped: int | None, **arguments: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        probe = probes.attach(model, optimizer, detectors=[NonFiniteDetector()], **arguments)
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).cuda()
            model(x * (math.nan if step == bad else 1.0)).square().mean().backward()
            if step != skipped:
                optimizer.step()
        probe.close()
        return list(model.parameters())

    with pytest.warns(probes.DivergenceWarning):
        skipping = train(4, None, same_step=True, on_divergence="skip")
    assert_equal(skipping, train(None, 4))
