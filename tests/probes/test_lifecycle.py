"""Letting go: what is left of a probe when it is closed, and when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import probes
import stability
from tests.probes.lifecycle import assert_nothing_is_left, linear, one_step
from tests.probes.models import SelfAttention, torch_attention, transformer_encoder


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
