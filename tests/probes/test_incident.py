"""Incident folders: when they are written, what they hold, and that they never stand in the way."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes import incident
from stability.divergence import Alert, Detector, EpisodeDetector
from stability.divergence.detector import Severity

ALERTS = {
    "warning": Alert(0, "0", "grad_norm", "warning", 2.0, 1.0, "it is large.", kind="gradient-explosion"),
    "divergence": Alert(0, "0", "grad_norm", "divergence", math.nan, None, "it is NaN.", kind="non-finite"),
}


class Script:
    """Speaks at given steps."""

    def __init__(self, alerts: dict[int, Severity]) -> None:
        self.alerts = alerts

    def update(self, step: int, readings: object) -> list[Alert]:
        if step not in self.alerts:
            return []
        alert = ALERTS[self.alerts[step]]
        return [Alert(step, *[getattr(alert, name) for name in list(vars(alert))[1:]])]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class Spoken(Script):
    """Gives these alerts."""

    def __init__(self, alerts: dict[int, Alert]) -> None:
        self.given = alerts

    def update(self, step: int, readings: object) -> list[Alert]:
        return [self.given[step]] if step in self.given else []


def train(
    log_dir: Path,
    steps: int,
    alerts: dict[int, Severity],
    fails_at: int = -1,
    detectors: Sequence[Detector] | None = None,
) -> probes.Probe:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    detectors = [Script(alerts)] if detectors is None else detectors
    with probes.attach(
        model, optimizer, log_dir=log_dir, detectors=detectors, on_divergence="ignore"
    ) as probe:
        for step in range(steps):
            probe.log(loss=float(step))
            probe.log_batch([step, step + 1])
            optimizer.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            if step == fails_at:
                raise RuntimeError("device-side assert\nsecond line")
    return probe


def folders(log_dir: Path) -> list[str]:
    return sorted(path.name for path in (log_dir / "incidents").glob("*"))


class TestWhen:
    def test_a_run_without_alerts_has_none(self, tmp_path: Path) -> None:
        train(tmp_path, 5, {})
        assert not (tmp_path / "incidents").exists()

    def test_an_alert_and_the_end_after_it(self, tmp_path: Path) -> None:
        train(tmp_path, 8, {3: "warning"})
        assert folders(tmp_path) == ["step-000003-gradient-explosion", "step-000008-exit"]

    def test_an_alert_of_the_last_step_needs_no_report_of_the_end(self, tmp_path: Path) -> None:
        train(tmp_path, 4, {3: "warning"})
        assert folders(tmp_path) == ["step-000003-gradient-explosion"]

    def test_one_folder_an_episode_and_one_more_when_it_diverges(self, tmp_path: Path) -> None:
        warnings = dict.fromkeys((3, 4, 90, 150, 320), "warning")
        train(tmp_path, 322, {**warnings, 5: "divergence", 6: "divergence"})
        assert folders(tmp_path) == [
            "step-000003-gradient-explosion",
            "step-000005-non-finite",
            "step-000320-gradient-explosion",
            "step-000322-exit",
        ]

    def test_their_number_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(incident, "EPISODE_STEPS", 1)
        train(tmp_path, 60, dict.fromkeys(range(0, 60, 3), "warning"))
        assert len(folders(tmp_path)) == incident.MAX_INCIDENTS + 1

    def test_many_warnings_leave_room_for_divergence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(incident, "EPISODE_STEPS", 1)
        train(tmp_path, 60, {**dict.fromkeys(range(0, 50, 3), "warning"), 55: "divergence"})
        assert "step-000055-non-finite" in folders(tmp_path)

    def test_an_exception(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="device-side assert"):
            train(tmp_path, 8, {}, fails_at=5)
        (name,) = folders(tmp_path)
        assert name == "step-000006-RuntimeError"
        report = (tmp_path / "incidents" / name / "report.md").read_text().splitlines()
        assert report[2] == (
            "RuntimeError: device-side assert ended the training in step 6; no alert came before."
        )
        assert 'raise RuntimeError("device-side assert\\nsecond line")' in "\n".join(report)

    def test_a_device_that_is_lost_takes_neither_the_error_nor_the_report(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after a CUDA fault: every copy fails, and the script's own exception is on its way."""
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def lost(self: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        with pytest.warns(probes.ProbeWarning, match="the numbers of step 3 could not be copied") as caught:
            with pytest.raises(RuntimeError, match="device-side assert"):
                with probes.attach(model, optimizer, log_dir=tmp_path, detectors=[]):
                    for step in range(6):
                        model(torch.ones(1, 1)).sum().backward()
                        optimizer.step()
                        if step == 3:
                            monkeypatch.setattr("probes.transfer.Transfer.wait", lost)
                    raise RuntimeError("CUDA error: device-side assert triggered")
        assert len(caught) == 1
        assert folders(tmp_path) == ["step-000006-RuntimeError"]
        assert probes.read(tmp_path)["grad_norm/(all)"].steps.tolist() == [0, 1, 2]

    def test_ctrl_c(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        with pytest.raises(KeyboardInterrupt), probes.attach(model, log_dir=tmp_path) as probe:
            model(torch.ones(1, 1)).sum().backward()
            probe.step()
            raise KeyboardInterrupt
        assert folders(tmp_path) == ["step-000001-KeyboardInterrupt"]

    def test_leaving_by_exit_is_no_incident(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit), probes.attach(nn.Linear(1, 1), log_dir=tmp_path):
            raise SystemExit(0)
        assert folders(tmp_path) == []

    def test_the_error_that_an_alert_raises_has_the_alerts_folder(self, tmp_path: Path) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        arguments = {"detectors": [Script({1: "divergence"})], "on_divergence": "raise"}
        with pytest.raises(probes.DivergenceError, match=r"one recorded step later; .*report\.html"):
            with probes.attach(model, optimizer, log_dir=tmp_path, **arguments):
                for _ in range(4):
                    model(torch.ones(1, 1)).sum().backward()
                    optimizer.step()
        assert folders(tmp_path) == ["step-000001-non-finite"]

    @pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt"])
    def test_a_script_that_never_closes(self, tmp_path: Path, kind: str) -> None:
        script = f"""
import torch, probes
model = torch.nn.Linear(2, 1)
probe = probes.attach(model, log_dir={str(tmp_path)!r})
for _ in range(3):
    model(torch.ones(1, 2)).sum().backward()
    probe.step()
raise {kind}
"""
        subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
        assert folders(tmp_path) == [f"step-000003-{kind}"]

    def test_a_script_that_goes_to_another_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        model = nn.Linear(1, 1)
        with probes.attach(
            model, log_dir="run", detectors=[Script({0: "warning"})], on_divergence="ignore"
        ) as probe:
            monkeypatch.chdir(tmp_path / "elsewhere")
            model(torch.ones(1, 1)).sum().backward()
            probe.step()
        assert folders(tmp_path / "run") == ["step-000000-gradient-explosion"]
        assert not list((tmp_path / "elsewhere").iterdir())


class TestHowItWentOn:
    """Consequences that were not told on their own are in the report of the end."""

    @pytest.fixture
    def attention(self, tmp_path: Path) -> Path:
        """A weight jumps at step 40; the attention behind it sharpens from there on, layer 1 of 2."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with probes.attach(model, optimizer, log_dir=tmp_path, on_divergence="ignore") as probe:
            for step in range(111):
                if step >= 40:
                    with torch.no_grad():
                        model.layers[1].self_attn.in_proj_weight[:32].mul_(1.04)
                x = torch.randn(4, 6, 16)
                optimizer.zero_grad()
                (model(x) - x.roll(1, 1)).square().mean().backward()
                optimizer.step()
        assert [(alert.step, alert.kind) for alert in probe.alerts] == [(40, "weight-jump")]
        return tmp_path / "incidents"

    def test_in_the_layer_where_it_began(self, attention: Path) -> None:
        first = (attention / "step-000040-weight-jump" / "report.md").read_text()
        end = (attention / "step-000111-exit" / "report.md").read_text()
        assert "logit" not in first
        assert "Since then: logit growth in `layers.1.self_attn` at step 70" in end.splitlines()[2]
        assert "| spread to | no other layer that a detector named |" in end

    def test_of_the_gravest_alert_though_another_episode_came_later(self, tmp_path: Path) -> None:
        def alert(step: int, layer: str, severity: Severity) -> Alert:
            return Alert(step, layer, "grad_norm", severity, 9.0, 1.0, "it is large.", "update-rms", step)

        spoken = {
            2: alert(2, "0", "divergence"),
            3: alert(3, "2", "warning"),
            6: alert(6, "2", "warning"),
            7: alert(7, "0", "warning"),
        }
        detector = EpisodeDetector([Spoken(spoken)], quiet_steps=2)
        train(tmp_path, 10, {}, detectors=[detector])
        end = (tmp_path / "incidents" / "step-000010-exit" / "report.md").read_text()
        assert end.splitlines()[2].endswith("Since then: update rms in `2` at step 3.")
        assert "| spread to | `2` |" in end

    def test_of_an_event_rather_than_the_condition_that_came_before(self, tmp_path: Path) -> None:
        def alert(step: int, kind: str) -> Alert:
            return Alert(step, "2", "grad_norm", "warning", 9.0, 1.0, "it is large.", kind, step)

        kinds = {2: "logit-growth", 4: "loss-spike", 5: "update-rms"}
        detector = EpisodeDetector([Spoken({step: alert(step, kind) for step, kind in kinds.items()})])
        train(tmp_path, 10, {}, detectors=[detector])
        end = (tmp_path / "incidents" / "step-000010-exit" / "report.md").read_text().splitlines()[2]
        assert end.startswith(
            "The training ended after step 10; loss spike (warning) began in `2` at step 4: "
        )
        assert "It follows logit-growth in 2 at step 2" in end
        assert end.endswith("Since then: update rms in `2` at step 5.")


class TestWhat:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        train(tmp_path, 30, {25: "divergence"})
        return tmp_path / "incidents" / "step-000025-non-finite"

    def test_the_series(self, folder: Path) -> None:
        run = probes.read(folder / "series.npz")
        assert run["loss/(all)"].values.tolist() == [float(step) for step in range(26)]
        whole = probes.read(folder.parent.parent)
        np.testing.assert_array_equal(run["grad_norm/2"].values, whole["grad_norm/2"].values[:26])

    def test_the_environment(self, folder: Path) -> None:
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["torch"] == torch.__version__
        assert environment["directory"] == os.getcwd()
        assert {"python", "triton", "numpy", "CUDA", "GPU", "OS", "stability-probes", "command"} < set(
            environment
        )

    def test_the_batches(self, folder: Path) -> None:
        batches = json.loads((folder / "batches.json").read_text())
        assert batches[-1] == {"step": 26, "indices": [26, 27]}
        assert len(batches) == incident.NUM_BATCHES

    def test_the_report_begins_with_the_summary(self, folder: Path) -> None:
        report = (folder / "report.md").read_text()
        assert report.splitlines()[2] == "Non finite (divergence) began in `0` at step 25: it is NaN."

    def test_the_page_needs_nothing_else(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()
        assert "Non finite (divergence) began in <code>0</code> at step 25" in page
        for word in ("http://", "https://", "src=", "<script", "<link", "@import"):
            assert word not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


class TestFailures:
    def test_a_failure_is_one_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*arguments: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(incident, "EPISODE_STEPS", 1)
        with pytest.warns(probes.ProbeWarning, match="incident at step 3 .* could not be written") as caught:
            probe = train(tmp_path, 12, {3: "warning", 9: "warning"})
        assert len(caught) == 1
        assert folders(tmp_path) == []
        assert len(probe.alerts) == 2

    def test_what_a_killed_process_was_writing_is_swept_away(self, tmp_path: Path) -> None:
        unfinished = tmp_path / "incidents" / ".unfinished-12345"
        unfinished.mkdir(parents=True)
        (unfinished / "report.md").write_text("half a rep")
        train(tmp_path, 2, {})
        assert folders(tmp_path) == []

    def test_a_second_run_keeps_the_first_runs_folder(self, tmp_path: Path) -> None:
        train(tmp_path, 4, {3: "warning"})
        with pytest.warns(probes.ProbeWarning, match="steps up to 3 of an earlier run"):
            train(tmp_path, 4, {3: "warning"})
        assert folders(tmp_path) == ["step-000003-gradient-explosion", "step-000003-gradient-explosion-2"]


class TestLoggingBatches:
    def test_what_is_no_integer(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe:
            with pytest.raises(TypeError, match="`indices` must be integers; got float64"):
                probe.log_batch([0.5])
            with pytest.raises(TypeError, match="`indices` must be integers; got <U1"):
                probe.log_batch(["a"])

    def test_a_tensor_elsewhere(self) -> None:
        with probes.attach(nn.Linear(1, 1)) as probe:
            with pytest.raises(ValueError, match="must be on the CPU; got a tensor on meta"):
                probe.log_batch(torch.zeros(2, dtype=torch.int64, device="meta"))

    def test_after_close(self) -> None:
        probe = probes.attach(nn.Linear(1, 1))
        probe.close()
        with pytest.raises(RuntimeError, match=r"probe\.log_batch\(\) after close"):
            probe.log_batch([1])


def test_a_training_that_goes_back_to_a_checkpoint_has_folders_of_its_own(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    detectors = [Script({})]
    with probes.attach(
        model, optimizer, log_dir=tmp_path, detectors=detectors, on_divergence="ignore"
    ) as probe:
        state = probe.state_dict()
        for steps, at in ((302, 300), (50, 20)):
            probe.load_state_dict(state)
            detectors[0].alerts = {at: "divergence"}
            for _ in range(steps):
                optimizer.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
    names = sorted(folder.name for folder in (tmp_path / "incidents").iterdir())
    assert names == ["step-000020-non-finite", "step-000050-exit", "step-000300-non-finite"]


def test_where_the_working_directory_is_gone_a_probe_is_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert incident.environment()["directory"] == "(deleted)"
    probes.attach(nn.Linear(1, 1), log_dir=tmp_path).close()


@pytest.mark.parametrize("kind", ["x" * 300, "日" * 100], ids=["letters", "wide letters"])
def test_a_kind_of_ones_own_may_have_a_long_name(tmp_path: Path, kind: str) -> None:
    alert = Alert(1, "0", "grad_norm", "warning", 2.0, 1.0, "it is large.", kind=kind)
    train(tmp_path, 2, {}, detectors=[Spoken({1: alert})])
    (folder,) = (tmp_path / "incidents").iterdir()
    assert folder.name.startswith(f"step-000001-{kind[:50]}")
