"""Failures while training, the probe's own and the training's: divergence."""

from __future__ import annotations

import math

import pytest
import torch

import probes
from probes import transfer
from probes.record import StepRecords
from probes.sinks import MemorySink
from stability.divergence import Alert, NonFiniteDetector
from tests.probes.lifecycle import assert_nothing_is_left, linear, one_step
from tests.probes.models import SelfAttention, torch_attention, transformer_encoder


class TestFailuresWhileTraining:
    def test_a_failing_sink_warns_once_and_training_goes_on(self) -> None:
        class FullDisk(MemorySink):
            def write(self, records: StepRecords) -> None:
                raise OSError("disk full")

        model, optimizer = linear()
        with pytest.warns(probes.ProbeWarning, match="FullDisk failed and is dropped") as caught:
            with probes.attach(model, optimizer, sinks=[FullDisk()]) as probe:
                for _ in range(4):
                    one_step(model, optimizer, torch.ones(1, 2))
        assert len(caught) == 1
        assert {record.step for record in probe.records} == {0, 1, 2, 3}

    def test_a_failing_measurement_warns_once_and_the_rest_goes_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: object) -> None:
            raise RuntimeError("bug")

        monkeypatch.setattr("probes.optimizer_watch.measure_gradients", broken)
        model, optimizer = linear()
        with pytest.warns(probes.ProbeWarning, match="measuring gradients failed at step 0") as caught:
            with probes.attach(model, optimizer, activations_every=1) as probe:
                for _ in range(3):
                    one_step(model, optimizer, torch.ones(1, 2))
        assert len(caught) == 1
        assert {r.step for r in probe.records if r.quantity == "activation_rms"} == {0, 1, 2}

    def test_a_failing_attention_measurement_does_not_break_the_model(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: object, **named: object) -> None:
            raise RuntimeError("bug")

        monkeypatch.setattr("stability.attention.seen.call_statistics", broken)
        model = SelfAttention(torch_attention)
        with pytest.warns(probes.ProbeWarning, match="measuring attention failed"):
            with probes.attach(model, attention_every=1) as probe:
                model(torch.rand(1, 3, 16)).sum().backward()
                probe.step()
        assert len(probe.attention_sites) == 1

    def test_one_copy_per_recorded_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        copies = []
        original = transfer._copy_to_host
        monkeypatch.setattr(transfer, "_copy_to_host", lambda *a: (copies.append(1), original(*a))[1])
        model = transformer_encoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with probes.attach(model, optimizer, every=2, attention_every=4) as probe:
            for _ in range(8):
                one_step(model, optimizer, torch.rand(2, 4, 32))
        assert len(copies) == len({record.step for record in probe.records}) == 4


class TestDivergence:
    def explode(self, **arguments: object) -> tuple[probes.Probe, int]:
        """Steps a model whose input turns NaN at step 2; returns how many steps were done."""
        model, optimizer = linear()
        done = 0
        probe = probes.attach(model, optimizer, **arguments)
        with probe:
            for step in range(6):
                one_step(model, optimizer, torch.full((1, 2), math.nan if step == 2 else 1.0))
                done += 1
        return probe, done

    def test_it_warns_once_and_names_the_layer(self) -> None:
        with pytest.warns(probes.DivergenceWarning, match=r"step 2: divergence in \(root\)") as caught:
            probe, done = self.explode()
        assert len(caught) == 1
        assert done == 6
        assert [(alert.step, alert.layer) for alert in probe.alerts] == [(2, "(root)")]

    def test_raise_stops_one_recorded_step_later(self) -> None:
        with pytest.raises(probes.DivergenceError) as caught:
            self.explode(on_divergence="raise")
        assert caught.value.alert.step == 2

    def test_raise_at_the_last_step_comes_with_close(self) -> None:
        model, optimizer = linear()
        probe = probes.attach(model, optimizer, on_divergence="raise")
        one_step(model, optimizer, torch.full((1, 2), math.nan))
        with pytest.raises(probes.DivergenceError):
            probe.close()
        assert_nothing_is_left(model, optimizer)

    def test_a_function_gets_the_alert(self) -> None:
        alerts: list[Alert] = []
        probe, _ = self.explode(on_divergence=alerts.append)
        assert alerts == probe.alerts
        assert len(alerts) == 1

    def test_ignore_still_records(self, recwarn: pytest.WarningsRecorder) -> None:
        probe, _ = self.explode(on_divergence="ignore")
        assert len(probe.alerts) == 1
        assert not recwarn.list

    def test_a_failing_detector_is_dropped(self) -> None:
        class Buggy(NonFiniteDetector):
            def update(self, step: int, readings: object) -> list[Alert]:
                raise KeyError("bug")

        with pytest.warns(probes.ProbeWarning, match="Buggy failed and is dropped"):
            _probe, done = self.explode(detectors=[Buggy()])
        assert done == 6

    def test_steps_after_the_checkpoint_are_not_judged_by_what_is_loaded(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer, on_divergence="raise") as probe:
            one_step(model, optimizer, torch.ones(1, 2))
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            state = probe.state_dict()
            with pytest.raises(probes.DivergenceError, match="step 1"):
                for _ in range(2):  # the numbers of step 2 are under way when step 1 is told of
                    one_step(model, optimizer, torch.full((1, 2), math.nan))
            model(torch.full((1, 2), math.nan))
            model.load_state_dict(weights)
            optimizer.zero_grad()
            probe.load_state_dict(state)
            for _ in range(2):
                one_step(model, optimizer, torch.ones(1, 2))
        assert [alert.step for alert in probe.alerts] == [1]
        norms = [r for r in probe.records if (r.quantity, r.layer) == ("grad_norm", "(all)")]
        assert [r.step for r in norms] == [0, 1, 2, 1, 2]
        assert [math.isfinite(r.value) for r in norms] == [True, False, False, True, True]

    def test_state_continues_after_a_checkpoint(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as first:
            one_step(model, optimizer, torch.ones(1, 2))
            one_step(model, optimizer, torch.ones(1, 2))
        with probes.attach(model, optimizer) as second:
            second.load_state_dict(first.state_dict())
            one_step(model, optimizer, torch.ones(1, 2))
        assert {record.step for record in second.records} == {2}
