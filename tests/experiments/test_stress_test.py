from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import probes
from experiments import stress_run
from experiments.stress_test import main, parse_arguments

ROOT = Path(__file__).parents[2]
SMALL = ["--preset", "tiny", "--steps", "3", "--learning-rates", "1e-3", "1"]


def summary(log_dir) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((log_dir / "summary.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("stress")
    assert main([*SMALL, "--log-dir", str(path)]) == 0
    return path


def test_every_run_has_its_tensorboard_directory(log_dir):
    names = {path.name for path in log_dir.iterdir() if path.is_dir()}
    assert names == {f"{m}-lr{rate}-seed0" for m in ("softmax", "sigmoid") for rate in ("0.001", "1")}
    series = probes.read(log_dir / "sigmoid-lr1-seed0")
    assert series["grad_norm/blocks.0.attention.query"].steps.tolist() == [0, 1, 2]
    assert "attention/row_sum/blocks.1.attention" in series


def test_summary_holds_what_is_needed_to_repeat_the_test(log_dir):
    content = summary(log_dir)
    assert content["schema_version"] == 1
    assert content["is_interrupted"] is False
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["cpu_count"] >= 1
    assert "commit" in content
    assert content["command"].startswith("python -m experiments.stress_test --preset tiny")
    assert content["config"]["training"]["steps"] == 3
    assert content["config"]["model"]["norm_position"] == "post"
    assert content["parameters"]["total"] == sum(
        count for part, count in content["parameters"].items() if part != "total"
    )


def test_summary_agrees_with_the_probes_records(log_dir):
    for run in summary(log_dir)["runs"]:
        series = probes.read(log_dir / run["name"])
        assert run["steps"] == 3
        assert run["verdict"] == "too short"
        np.testing.assert_allclose(run["series"]["grad_norm"], series["grad_norm/(all)"].values, rtol=1e-6)
        np.testing.assert_allclose(run["series"]["loss"], series["loss/(all)"].values, rtol=1e-6)
        assert run["first_peak"] == max(run["series"]["grad_norm"])


def test_both_mechanisms_see_the_same_batches(log_dir):
    softmax, sigmoid = summary(log_dir)["runs"][:2]
    assert (softmax["mechanism"], sigmoid["mechanism"]) == ("softmax", "sigmoid")
    assert softmax["series"]["mean_loss"] == sigmoid["series"]["mean_loss"]


def test_figure_is_drawn(log_dir):
    assert (log_dir / "gradient_norms.png").read_bytes().startswith(b"\x89PNG")


def test_table_is_printed(tmp_path, capsys):
    assert main([*SMALL, "--mechanisms", "sigmoid", "--log-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("first peak", "orders", "first layer to explode", "too short", "At learning rate 1:"):
        assert expected in printed
    assert "softmax" not in printed.split("verdict")[1].split("peak, median")[0]


def test_repeating_a_test_replaces_its_records(tmp_path):
    arguments = ["--preset", "tiny", "--mechanisms", "softmax", "--learning-rates", "0.01"]
    for steps in ("4", "2"):
        assert main([*arguments, "--steps", steps, "--log-dir", str(tmp_path)]) == 0
    assert probes.read(tmp_path / "softmax-lr0.01-seed0")["loss/(all)"].steps.tolist() == [0, 1]


def test_ctrl_c_keeps_what_was_recorded(tmp_path, monkeypatch, capsys):
    loss_of = stress_run._loss
    calls = []

    def interrupted_at_the_fifth(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(stress_run, "_loss", interrupted_at_the_fifth)
    assert main([*SMALL, "--log-dir", str(tmp_path)]) == 130
    content = summary(tmp_path)
    assert content["is_interrupted"] is True
    assert [(run["steps"], run["verdict"]) for run in content["runs"]] == [
        (3, "too short"),
        (1, "interrupted"),
    ]
    assert (tmp_path / "gradient_norms.png").exists()
    assert "Interrupted: 2 of 4 runs recorded" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step_still_reports(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(stress_run, "_loss", interrupt)
    assert main([*SMALL, "--log-dir", str(tmp_path)]) == 130
    assert summary(tmp_path)["runs"][0]["steps"] == 0


def test_ctrl_c_between_two_runs_keeps_the_first(tmp_path, monkeypatch):
    attach = probes.attach
    attached = []

    def interrupted_at_the_second(*arguments, **keywords):
        if attached:
            raise KeyboardInterrupt
        attached.append(attach(*arguments, **keywords))
        return attached[0]

    monkeypatch.setattr(probes, "attach", interrupted_at_the_second)
    assert main([*SMALL, "--log-dir", str(tmp_path)]) == 130
    content = summary(tmp_path)
    assert content["is_interrupted"] is True
    assert [run["steps"] for run in content["runs"]] == [3]


def test_ctrl_c_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "attach", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*SMALL, "--log-dir", str(tmp_path)]) == 130
    assert "nothing is recorded" in capsys.readouterr().out


def test_a_real_interrupt_signal_ends_cleanly(tmp_path):
    command = [sys.executable, "-m", "experiments.stress_test", "--preset", "tiny", "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--log-dir", str(tmp_path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A test run that a shell put into the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not any(
            path.stat().st_size > 50_000 for path in tmp_path.glob("*/events*")
        ):  # some steps are recorded
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert b"Interrupted: 1 of 4 runs recorded" in output
    (run,) = summary(tmp_path)["runs"]
    assert run["verdict"] == "interrupted"
    assert run["steps"] == len(run["series"]["loss"]) == len(run["series"]["mean_loss"]) > 3


def test_ctrl_c_leaves_no_probe_attached(tmp_path, monkeypatch):
    attached = []
    attach = probes.attach
    monkeypatch.setattr(probes, "attach", lambda *a, **k: attached.append(attach(*a, **k)) or attached[-1])
    monkeypatch.setattr(stress_run, "_loss", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    main([*SMALL, "--log-dir", str(tmp_path)])
    assert len(attached) == 1
    assert attached[0].is_closed


def test_a_diverged_run_stops_early_and_is_recorded(tmp_path, monkeypatch):
    loss_of = stress_run._loss
    calls = []

    def overflowing(*arguments):
        calls.append(arguments)
        return loss_of(*arguments) * (float("inf") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(stress_run, "_loss", overflowing)
    assert main([*SMALL, "--mechanisms", "softmax", "--log-dir", str(tmp_path)]) == 0
    first, second = summary(tmp_path)["runs"]
    assert (first["steps"], first["verdict"], second["steps"]) == (2, "exploded", 3)
    assert first["series"]["loss"][1] == "Infinity"
    assert first["first_layer"] is not None


def test_training_learns_and_the_top_rate_does_not(tmp_path):
    arguments = ["--preset", "tiny", "--steps", "100", "--mechanisms", "sigmoid", "--log-dir", str(tmp_path)]
    main([*arguments, "--learning-rates", "1e-2", "30"])
    gentle, wild = summary(tmp_path)["runs"]
    assert gentle["verdict"] == "stable"
    assert wild["healthy_median"] == gentle["median"]
    assert wild["verdict"] in {"diverged", "exploded"}


def test_an_unreadable_data_file_is_named(tmp_path, capsys):
    pytest.importorskip("anndata", reason='needs `pip install "stability-probes[cells]"`')
    path = tmp_path / "broken.h5ad"
    path.write_bytes(b"no HDF5")
    assert main([*SMALL, "--data", str(path), "--log-dir", str(tmp_path)]) == 2
    assert "broken.h5ad could not be read" in capsys.readouterr().err


def test_missing_scanpy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    assert main([*SMALL, "--data", "pbmc68k", "--log-dir", str(tmp_path)]) == 2
    assert 'pip install "stability-probes[cells]"' in capsys.readouterr().err


def test_an_unwritable_log_directory_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([*SMALL, "--log-dir", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be at least 1; got 0"),
        (["--learning-rates", "-1"], "must be a positive number; got -1"),
        (["--learning-rates", "nan"], "must be a positive number; got nan"),
        (["--mask-fraction", "2"], r"must lie in \(0, 1\]; got 2"),
        (["--mechanisms", "linear"], "invalid choice: 'linear'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--device", "cuda"])
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


def test_laptop_preset_is_what_the_documentation_promises():
    options = parse_arguments([])
    assert (options.preset, options.data, options.tokens, options.warmup_steps) == (
        "laptop",
        "pbmc68k",
        512,
        0,
    )
    assert len(options.seeds) >= 2


@pytest.mark.gpu
def test_runs_under_autocast_on_a_gpu(tmp_path):
    assert main([*SMALL, "--device", "cuda", "--log-dir", str(tmp_path)]) == 0
    assert summary(tmp_path)["hardware"]["gpu_peak_memory_gib"] >= 0
