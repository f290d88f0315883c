from __future__ import annotations

import json

import pytest
import torch

from experiments import attention_benchmark
from experiments.attention_benchmark import PRESETS, main, measure
from experiments.attention_contenders import PASSES, Case, Contender, Inputs, contenders, relative_error

TINY = ["--device", "cpu", "--preset", "tiny", "--rounds", "2", "--turn-ms", "0.5"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention")
    assert main([*TINY, "--out", str(path)]) == 0
    return path


def test_every_case_is_measured_in_every_pass(out):
    summary = json.loads((out / "attention.json").read_text())
    found = {(m["case"], m["which"]) for m in summary["measurements"]}
    assert found == {(str(case), which) for case in PRESETS["tiny"] for which in PASSES}
    for m in summary["measurements"]:
        assert m["teraflops"] > 0
        assert m["error"] < 1e-6
    assert all("runs on 'reference'" in text for text in summary["explanations"].values())
    assert all(values["matrix product, TFLOP/s"] > 0 for values in summary["ceilings"].values())
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_only_work_on_valid_tokens_counts():
    dense = Case(2, 4, 100, 8)
    assert dense.flop("forward") == 4 * 2 * 4 * 100**2 * 8
    assert dense.flop("backward") == 2.5 * dense.flop("forward")
    assert Case(2, 4, 100, 8, is_causal=True).flop("forward") == dense.flop("forward") / 2
    padded = Case(2, 4, 100, 8, padding=0.25)
    assert padded.lengths == [88, 62]
    assert padded.flop("forward") == 4 * 4 * (88**2 + 62**2) * 8


def test_error_is_that_of_the_contender():
    case = Case(2, 2, 64, 16, padding=0.25)
    inputs = Inputs.random(case, "cpu", torch.float32)
    (exact,) = contenders(case, "cpu")
    doubled = Contender("doubled", "ours", lambda *tensors: 2 * exact.attend(*tensors))
    assert relative_error(exact, case, inputs) < 1e-6
    assert relative_error(doubled, case, inputs) == pytest.approx(1.0)


def test_a_slower_function_takes_longer():
    x = torch.randn(64, 64)
    times = measure(
        {"once": lambda: x @ x, "often": lambda: [x @ x for _ in range(20)]},
        rounds=3,
        turn_ms=1,
        device="cpu",
    )
    assert times["often"] > 5 * times["once"]


def test_an_interrupted_run_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_benchmark, "measure_case", interrupted)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert "nothing is measured" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err
