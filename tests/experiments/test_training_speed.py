from __future__ import annotations

import json

import pytest
import torch

from experiments import training_speed
from experiments.attention_contenders import Case, Contender
from experiments.training_speed import PRESETS, Speed, amdahl, case_name, main, measure_case, ratios
from experiments.training_speed_contenders import SharedTraining, speed_contenders

TINY = ["--preset", "tiny", "--rounds", "3"]
CASE, PADDED = Case(2, 2, 32, 8), Case(2, 2, 32, 8, padding=0.5)


def speed(name: str, kind: str, turns: list[float], attention: float) -> Speed:
    median = sorted(turns)[len(turns) // 2]
    return Speed(name, kind, median, 1.0, attention, attention / median, turns)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    assert main([*TINY, "--out", str(out)]) == 0
    assert "| eager, n 32, 50% padding | sigmoid, accurate |" in (out / "training_speed.md").read_text()
    return json.loads((out / "training_speed.json").read_text())


def test_every_case_is_measured(summary):
    assert [result["case"] for result in summary["results"]] == ["eager, n 32", "eager, n 32, 50% padding"]
    for result in summary["results"]:
        assert result["failed"] == {}
        assert all(len(each["turns"]) == 3 for each in result["speeds"])
        (ratio,) = result["ratios"]
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert ratio["is_best"]


def test_only_valid_tokens_count(summary):
    dense, padded = summary["results"]
    assert (sum(dense["lengths"]), sum(padded["lengths"])) == (64, 32)
    for result in (dense, padded):
        for each in result["speeds"]:
            expected = 1e3 * sum(result["lengths"]) / each["milliseconds"]
            assert each["tokens_per_second"] == pytest.approx(expected)


def test_ratios_by_hand():
    found = ratios(
        [
            speed("sigmoid", "ours", [80.0, 100.0, 90.0], 10.0),
            speed("slow", "softmax", [160.0, 200.0, 180.0], 100.0),
            speed("fast", "softmax", [88.0, 110.0, 99.0], 22.0),
        ]
    )
    slow, fast = found
    assert (slow.ratio, slow.low, slow.high, slow.is_best) == (2.0, 2.0, 2.0, False)
    assert slow.predicted == pytest.approx(180 / (180 - 100 + 10))
    assert not slow.needs_explanation
    assert fast.is_best
    assert fast.predicted == pytest.approx(99 / 87)
    assert fast.gap == pytest.approx(1.1 / (99 / 87) - 1)
    assert fast.needs_explanation  # 3.3 %


def test_amdahl_without_a_change():
    assert amdahl(10.0, 4.0, 4.0) == 1.0


def test_contenders_share_weights_and_agree_where_they_compute_the_same():
    """Softmax by SDPA with its mask, and by lengths: the same step from the same weights."""
    _, sdpa = speed_contenders(PADDED, "cpu")
    lengths = torch.tensor(PADDED.lengths)

    def by_lengths(query, key, value):
        from stability import softmax_attention

        return softmax_attention(query, key, value, key_lengths=lengths, query_lengths=lengths)

    results = []
    for contender in (sdpa, Contender("lengths", "softmax", by_lengths)):
        training = SharedTraining(PADDED, 2, "cpu")
        before = training.model.value_head.weight.clone()
        training.step_of(contender, "eager", "eager")()
        assert not torch.equal(training.model.value_head.weight, before)
        results.append(training.model.gene_embedding.weight.detach())
    assert torch.allclose(*results, atol=1e-6)


def test_a_contender_that_cannot_train_is_left_out(monkeypatch):
    def broken(query, key, value):
        raise RuntimeError("no such kernel")

    ours, softmax = speed_contenders(CASE, "cpu")
    others = [ours, Contender("broken", "softmax", broken), softmax]
    monkeypatch.setattr(training_speed, "speed_contenders", lambda case, device: others)
    speeds, failed = measure_case("eager", CASE, 1, "cpu", rounds=1, steps=1)
    assert [each.name for each in speeds] == [ours.name, softmax.name]
    assert failed == {"broken": "RuntimeError('no such kernel')"}


def test_the_exit_status_tells_that_ours_failed(monkeypatch, tmp_path, capsys):
    def broken(query, key, value):
        raise RuntimeError("no such kernel")

    _, softmax = speed_contenders(CASE, "cpu")
    others = [Contender("sigmoid, broken", "ours", broken), softmax]
    monkeypatch.setattr(training_speed, "speed_contenders", lambda case, device: others)
    assert main([*TINY, "--cases", "eager, n 32", "--out", str(tmp_path)]) == 1
    assert "Failed: eager, n 32, sigmoid, broken: RuntimeError" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE, PADDED])
def test_compiled_contenders_of_one_function_keep_their_own_code(case, monkeypatch):
    """Alike for dynamo's guards but for the compiler: each is compiled once, and for all blocks."""
    ours, softmax = speed_contenders(case, "cpu")
    twin = Contender("twin", "softmax", softmax.attend)
    compiled = []

    def count(graph, inputs):
        compiled.append(name)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: count)
    torch._dynamo.reset()
    for contender in (ours, softmax, twin):
        weights = []
        for mode in ("eager", "compiled"):
            name = contender.name
            training = SharedTraining(case, 2, "cpu")
            step = training.step_of(contender, mode, "inductor")
            step()
            step()
            weights.append(training.model.gene_embedding.weight.detach())
        assert torch.allclose(*weights, atol=1e-6)
    assert compiled == [ours.name, softmax.name, "twin"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("padding", [0.0, 0.5])
def test_every_contender_trains_on_a_gpu(mode, padding):
    case = Case(2, 2, 256, 64, padding=padding)
    torch._dynamo.reset()
    speeds, failed = measure_case(mode, case, 1, "cuda", rounds=1, steps=1)
    assert not failed
    assert len(speeds) == len(speed_contenders(case, "cuda")) == 6


def test_the_plan_has_every_case():
    names = [case_name(mode, case) for mode, case in PRESETS["160m"].cases]
    assert len(set(names)) == 8
    for mode, case in PRESETS["160m"].cases:
        assert sum(case.lengths or [case.tokens] * case.batch) == (8192 if case.padding else 16384), mode


def test_bad_flags(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--cases", "compiled*"])
    assert "no case matches compiled*; there are: eager, n 32;" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*TINY, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "training_speed:" in capsys.readouterr().err
