"""Attaching, bad input, failures while training, and letting go."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import probes
import stability
from probes import transfer
from probes.record import StepRecords
from probes.sinks import MemorySink
from stability.divergence import Alert, NonFiniteDetector
from tests.probes.models import SelfAttention, torch_attention, transformer_encoder


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def assert_nothing_is_left(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks_always_called
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert "reporting" not in repr(torch.nn.functional.scaled_dot_product_attention)
    assert not hasattr(torch.nn.functional.scaled_dot_product_attention, "__wrapped__")


class TestBadInput:
    def test_a_model_that_is_none(self) -> None:
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got str"):
            probes.attach("model")

    def test_a_model_without_parameters(self) -> None:
        with pytest.raises(ValueError, match="must have parameters to watch; ReLU has none"):
            probes.attach(nn.ReLU())

    def test_a_filter_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"blocks\.\*.*matches none.*The first are: \(root\), 0"):
            probes.attach(nn.Sequential(nn.Linear(1, 1)), layers="blocks.*", log_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_filter_of_numbers(self) -> None:
        with pytest.raises(TypeError, match="pattern"):
            probes.attach(nn.Linear(1, 1), layers=[3])

    def test_a_filter_that_is_a_number(self) -> None:
        with pytest.raises(TypeError, match="`layers` must be a pattern or a sequence of patterns.*got 3"):
            probes.attach(nn.Linear(1, 1), layers=3)

    @pytest.mark.parametrize(
        ("patterns", "idle"), [(["0", "blok.*"], r"'blok\.\*'"), (["x", "y", "0"], "'x', 'y'"), ([], r"\[\]")]
    )
    def test_one_filter_of_several_that_matches_nothing(self, patterns: list[str], idle: str) -> None:
        with pytest.raises(ValueError, match=rf"; {idle} matches none of the model's 2\. The first are"):
            probes.attach(nn.Sequential(nn.Linear(1, 1)), layers=patterns)

    def test_what_is_no_directory(self) -> None:
        with pytest.raises(TypeError, match="`log_dir` must be a path or None; got 3"):
            probes.attach(nn.Linear(1, 1), log_dir=3)
        with pytest.raises(ValueError, match="`log_dir` must name a directory; got an empty path"):
            probes.attach(nn.Linear(1, 1), log_dir="")

    def test_a_same_step_that_is_neither_true_nor_false(self) -> None:
        model, optimizer = linear()
        with pytest.raises(TypeError, match="`same_step` must be True or False; got 'no'"):
            probes.attach(model, optimizer, same_step="no")

    def test_attaching_twice(self) -> None:
        model = nn.Linear(1, 1)
        with probes.attach(model), pytest.raises(ValueError, match="watched already; close its probe"):
            probes.attach(model)
        probes.attach(model).close()  # after closing it may be watched again

    def test_a_compiled_model(self) -> None:
        with pytest.raises(ValueError, match=r"`model` is compiled.*attach to the model first"):
            probes.attach(torch.compile(nn.Linear(1, 1)))
        with pytest.raises(ValueError, match=r"`1` in `model` is compiled"):
            probes.attach(nn.Sequential(nn.Linear(1, 1), torch.compile(nn.Linear(1, 1))))

    def test_an_optimizer_of_another_model(self) -> None:
        with pytest.raises(ValueError, match="this SGD holds none of Linear's"):
            probes.attach(nn.Linear(1, 1), linear()[1])

    def test_an_optimizer_that_is_none(self) -> None:
        with pytest.raises(TypeError, match="`optimizer` must be"):
            probes.attach(nn.Linear(1, 1), "adam")

    @pytest.mark.parametrize("name", ["every", "attention_every", "layer_jacobian_every"])
    def test_a_negative_interval(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"`{name}` must be at least 0; got -1"):
            probes.attach(nn.Linear(1, 1), **{name: -1})

    def test_no_attention_rows(self) -> None:
        with pytest.raises(ValueError, match="`attention_rows` must be at least 1; got 0"):
            probes.attach(nn.Linear(1, 1), attention_rows=0)

    def test_a_fractional_interval(self) -> None:
        with pytest.raises(TypeError, match="`every` must be an integer; got 0.5"):
            probes.attach(nn.Linear(1, 1), every=0.5)

    def test_an_unknown_action(self) -> None:
        with pytest.raises(ValueError, match="`on_divergence` must be one of"):
            probes.attach(nn.Linear(1, 1), on_divergence="panic")

    @pytest.mark.parametrize(
        ("name", "given", "got"),
        [
            ("sinks", MemorySink(), "got MemorySink"),
            ("sinks", [MemorySink], "got the class MemorySink itself"),
            ("sinks", [Path("run.jsonl")], "one of them is "),
            ("detectors", NonFiniteDetector(), "got NonFiniteDetector"),
            ("detectors", [NonFiniteDetector], "got the class NonFiniteDetector itself"),
            ("detectors", "all", "got str"),
        ],
    )
    def test_what_is_no_list_of_sinks_or_detectors(self, name: str, given: object, got: str) -> None:
        with pytest.raises(TypeError, match=f"`{name}` must be a list of objects with .*{got}"):
            probes.attach(nn.Linear(1, 1), **{name: given})

    def test_an_unwritable_log_dir(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        model, optimizer = linear()
        with pytest.raises(OSError, match="Choose a writable log_dir"):
            probes.attach(model, optimizer, log_dir=tmp_path / "file" / "run")
        assert_nothing_is_left(model, optimizer)

    def test_attention_asked_for_where_there_is_none(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer, attention_every=5):
            model(torch.ones(1, 2)).sum().backward()
            before = model.weight.clone()
            with pytest.raises(ValueError, match="the model made no attention call"):
                optimizer.step()
            assert torch.equal(model.weight, before)

    def test_a_model_without_attention_is_fine_by_default(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as probe:
            one_step(model, optimizer, torch.ones(1, 2))
        assert probe.attention_sites == []

    def test_stepping_and_logging_after_close(self) -> None:
        probe = probes.attach(nn.Linear(1, 1))
        probe.close()
        probe.close()
        with pytest.raises(RuntimeError, match=r"probe\.step\(\) after close"):
            probe.step()
        with pytest.raises(RuntimeError, match=r"probe\.log\(\) after close"):
            probe.log(loss=1.0)

    def test_stepping_by_hand_beside_an_optimizer(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as probe, pytest.raises(RuntimeError, match="Remove the call"):
            probe.step()

    def test_never_stepping_without_an_optimizer_is_said_once(self) -> None:
        model = nn.Linear(2, 1)
        with pytest.warns(probes.ProbeWarning, match=r"probe\.step\(\) was never called") as caught:
            with probes.attach(model):
                for _ in range(2):
                    model(torch.ones(1, 2)).sum().backward()
        assert [warning.filename for warning in caught] == [__file__]

    @pytest.mark.filterwarnings("error::probes.ProbeWarning")
    def test_nothing_is_said_of_a_step_that_is_cut_short(self) -> None:
        model = nn.Linear(2, 1)
        with probes.attach(model) as probe:
            probe.step()
            model(torch.ones(1, 2))
        probes.attach(model).close()
        with pytest.raises(KeyboardInterrupt), probes.attach(model):
            model(torch.ones(1, 2))
            raise KeyboardInterrupt

    def test_logging_what_is_no_number(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe:
            with pytest.raises(ValueError, match="`loss` must have one real element; got shape \\(3,\\)"):
                probe.log(loss=torch.ones(3))
            with pytest.raises(TypeError, match="`loss` must be a number or a tensor; got str"):
                probe.log(loss="low")
            with pytest.raises(ValueError, match="`grad_norm` is a name of the probe's own"):
                probe.log(grad_norm=1.0)

    def test_loading_the_state_of_other_detectors(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe, probes.attach(nn.Linear(1, 1), detectors=[]) as other:
            with pytest.raises(ValueError, match="Attach with the same ones"):
                other.load_state_dict(probe.state_dict())


class TestLettingGo:
    def test_no_hook_survives_the_block(self) -> None:
        model = transformer_encoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probes.attach(model, optimizer):
            one_step(model, optimizer, torch.rand(1, 4, 32))
        assert_nothing_is_left(model, optimizer)

    def test_no_hook_and_no_record_is_lost_on_an_exception(self) -> None:
        model, optimizer = linear()
        with pytest.raises(RuntimeError, match="out of luck"), probes.attach(model, optimizer) as probe:
            one_step(model, optimizer, torch.ones(1, 2))
            probe.log(loss=7.0)
            model(torch.ones(1, 2))
            raise RuntimeError("out of luck")
        assert_nothing_is_left(model, optimizer)
        assert {r.quantity for r in probe.records if r.step == 0} > {"grad_norm", "update_ratio"}
        # The step that was cut short is there as far as it got.
        assert {r.quantity: r.value for r in probe.records if r.step == 1}["loss"] == 7.0

    def test_a_forward_pass_that_raises_does_not_confuse_the_next(self) -> None:
        class Failing(SelfAttention):
            fails = True

            def forward(self, x: Tensor) -> Tensor:
                if self.fails:
                    raise RuntimeError("no")
                return super().forward(x)

        model = nn.Sequential(nn.Linear(16, 16), Failing(torch_attention))
        with probes.attach(model, attention_every=1) as probe:
            with pytest.raises(RuntimeError, match="no"):
                model(torch.rand(1, 3, 16))
            model[1].fails = False
            model(torch.rand(1, 3, 16)).sum().backward()
            probe.step()
        assert [site.layer for site in probe.attention_sites] == ["1"]

    def test_two_probes_on_two_models_do_not_mix(self) -> None:
        first, second = SelfAttention(torch_attention), SelfAttention(stability.sigmoid_attention)
        with probes.attach(first, attention_every=1) as one, probes.attach(second, attention_every=1) as two:
            for model, probe in ((first, one), (second, two)):
                model(torch.rand(1, 3, 16)).sum().backward()
                probe.step()
        assert [site.mechanism for site in one.attention_sites] == ["softmax"]
        assert [site.mechanism for site in two.attention_sites] == ["sigmoid"]

    def test_switched_off_it_hooks_no_module(self) -> None:
        model, optimizer = linear()
        off = {"every": 0, "activations_every": 0, "details_every": 0, "attention_every": 0}
        with probes.attach(model, optimizer, **off) as probe:
            assert not torch_module._global_forward_hooks
            one_step(model, optimizer, torch.ones(1, 2))
            probe.log(loss=1.0)
        assert [(r.step, r.quantity) for r in probe.records] == [(1, "loss")]

    def test_modules_are_hooked_only_for_steps_that_measure_them(self) -> None:
        model, optimizer = linear()
        hooked = []
        with probes.attach(model, optimizer) as probe:
            for _ in range(11):
                hooked.append(bool(torch_module._global_forward_hooks))
                one_step(model, optimizer, torch.ones(1, 2))
            state = probe.state_dict()
        assert hooked == [True, *[False] * 9, True]
        probe.load_state_dict({**state, "step": 0})
        assert not torch_module._global_forward_hooks

    def test_the_default_periods(self) -> None:
        model, optimizer = linear()
        with probes.attach(model, optimizer) as probe:
            for _ in range(201):
                one_step(model, optimizer, torch.ones(1, 2))
        steps = {
            quantity: sorted({r.step for r in probe.records if r.quantity == quantity})
            for quantity in ("grad_norm", "weight_norm", "activation_rms", "update_ratio")
        }
        assert steps == {
            "grad_norm": list(range(201)),
            "weight_norm": list(range(201)),
            "activation_rms": list(range(0, 201, 10)),
            "update_ratio": [0, 200],
        }

    def test_a_script_that_never_closes_loses_nothing(self, tmp_path: Path) -> None:
        script = f"""
import torch, probes
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
probe = probes.attach(model, optimizer, log_dir={str(tmp_path)!r})
for _ in range(3):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
        assert probes.read(tmp_path)["grad_norm/(all)"].steps.tolist() == [0, 1, 2]


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
