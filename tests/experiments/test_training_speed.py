from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from experiments import training_speed
from experiments.attention_contenders import Case, Contender
from experiments.cell_batches import MaskedBatch
from experiments.training_speed import PRESETS, case_name, main, measure_case, times_on_gpu
from experiments.training_speed_contenders import (
    PackedSequences,
    PackingAttention,
    SharedTraining,
    contenders_compile,
    speed_contenders,
)
from experiments.training_speed_report import Speed, amdahl, ratios
from experiments.training_speed_report import main as report

TINY = ["--preset", "tiny", "--rounds", "3"]
CASE, PADDED = Case(2, 2, 32, 8), Case(2, 2, 32, 8, padding=0.5)
PACKED = replace(PADDED, is_packed=True)


def speed(name: str, kind: str, turns: list[float], attention: float, on_gpu: float | None = None) -> Speed:
    median = sorted(turns)[len(turns) // 2]
    return Speed(name, kind, median, 1.0, attention, attention / median, on_gpu, None, turns)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    assert main([*TINY, "--out", str(out)]) == 0
    assert "| eager, n 32, 50% padding | sigmoid, accurate |" in (out / "training_speed.md").read_text()
    return json.loads((out / "training_speed.json").read_text())


def test_every_case_is_measured(summary):
    cases = [result["case"] for result in summary["results"]]
    assert cases == ["eager, n 32", "eager, n 32, 50% padding", "eager, n 32, 50% padding, packed"]
    for result in summary["results"]:
        assert result["failed"] == {}
        assert all(len(each["turns"]) == 3 for each in result["speeds"])
        for ratio in result["ratios"]:
            assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
            assert ratio["is_best"]


def test_only_valid_tokens_count(summary):
    assert [sum(result["lengths"]) for result in summary["results"]] == [64, 32, 32]
    for result in summary["results"]:
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


def test_a_step_that_waits_for_its_host():
    """Sigmoid's GPU needs 80 ms of 100; softmax's is busy all the time."""
    theirs = speed("softmax", "softmax", [110.0] * 3, 40.0, 110.0)
    (waits,) = ratios([speed("sigmoid", "ours", [100.0] * 3, 10.0, 80.0), theirs])
    assert (waits.ratio, waits.gpu_ratio) == (1.1, 1.375)
    assert waits.predicted == pytest.approx(110 / 80)
    assert waits.gap == pytest.approx(-0.2)
    assert not waits.needs_explanation
    (computes,) = ratios([speed("sigmoid", "ours", [100.0] * 3, 10.0, 100.0), theirs])
    assert computes.needs_explanation


def test_the_range_over_processes(summary, tmp_path, capsys):
    files = []
    for i, ratio in enumerate((1.1, 0.9, 1.05)):
        results = json.loads(json.dumps(summary["results"]))
        results[0]["ratios"][0] |= {"ratio": ratio, "is_best": ratio > 1}
        files.append(tmp_path / f"{i}.json")
        # The other cases were not reached by the last process.
        files[-1].write_text(json.dumps({"results": results[: 3 if i < 2 else 1]}))
    assert report([str(file) for file in files]) == 0
    *_, row = capsys.readouterr().out.strip().split("\n")
    start = "| eager, n 32 | sigmoid, accurate | softmax, torch's choice | 2 of 3 | 0.900 | 1.100 | – | "
    predicted = summary["results"][0]["ratios"][0]["predicted"]
    assert row == f"{start}{predicted:.3f} – {predicted:.3f} |"


@pytest.mark.parametrize("content", [None, "{}", "{"])
def test_files_that_are_no_summaries(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    assert report([str(tmp_path / "file.json")]) == 2
    assert "expected summaries of training_speed" in capsys.readouterr().err


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


def attend_one_by_one(query, key, value, starts, key_starts, longest, longest_key):
    assert starts.tolist() == key_starts.tolist() == [0, 3, 8]
    assert longest == longest_key == 5
    pieces = [each.tensor_split(starts[1:-1].tolist()) for each in (query, key, value)]
    attend = torch.nn.functional.scaled_dot_product_attention
    heads_first = [[each.transpose(0, 1) for each in piece] for piece in zip(*pieces, strict=True)]
    return torch.cat([attend(*piece).transpose(0, 1) for piece in heads_first])


def test_packed_attention_sees_the_tokens_of_each_sequence_alone(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    monkeypatch.setattr(varlen, "varlen_attn", attend_one_by_one)
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    query.requires_grad_()
    found = PackingAttention([3, 5], 5, "cpu")(query, key, value)
    from stability import softmax_attention

    expected = softmax_attention(query, key, value, key_lengths=[3, 5], query_lengths=[3, 5])
    assert torch.allclose(found, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.square().sum(), query)
    (right,) = torch.autograd.grad(expected.square().sum(), query)
    assert torch.allclose(gradient, right, atol=1e-5)


def test_a_packed_training_is_the_padded_one_without_the_padding():
    """The same weights after a step, whoever computes attention."""
    theirs = {each.kind: each for each in speed_contenders(PADDED, "cpu")}
    for contender in speed_contenders(PACKED, "cpu"):
        padded, packed = (SharedTraining(case, 2, "cpu") for case in (PADDED, PACKED))
        cells = padded.batch
        is_token = torch.arange(PADDED.tokens) < cells.lengths[:, None]
        genes, values, mask, targets = (
            each[is_token][None] for each in (cells.genes, cells.values, cells.mask, cells.targets)
        )
        packed.batch = MaskedBatch(genes, values, mask, None, targets)
        padded.step_of(theirs[contender.kind], "eager", "eager")()
        packed.step_of(contender, "eager", "eager")()
        for ours, other in zip(packed.model.parameters(), padded.model.parameters(), strict=True):
            assert torch.allclose(ours, other, atol=1e-6), contender.name


def test_packed_sequences_of_torchs_kernel(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", attend_one_by_one)
    packed = PackedSequences([3, 5], "cpu")
    tensors = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = packed.one_by_one(torch.nn.functional.scaled_dot_product_attention, *tensors)
    assert torch.allclose(packed.flash(*tensors), expected, atol=1e-6)


@pytest.mark.gpu
def test_packed_contenders_agree_on_a_gpu():
    case = Case(2, 2, 256, 64, padding=0.5, is_packed=True)
    contenders = {each.name: each for each in speed_contenders(case, "cuda")}
    tensors = torch.randn(3, *case.stored, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    for mechanism, name in (("sigmoid", "varlen"), ("softmax", "flash varlen")):
        together, apart = (
            contenders[f"{mechanism}, {each}"].attend(*tensors) for each in (name, "one by one")
        )
        # Two kernels, which round their weights to bfloat16 differently (one of them 0.978 of each).
        torch.testing.assert_close(together, apart, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_packed_attention_on_a_gpu():
    case = Case(2, 2, 256, 64, padding=0.5)
    contenders = {each.name: each for each in speed_contenders(case, "cuda")}
    tensors = torch.randn(3, 2, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    ours, theirs = (
        contenders[name].attend(*tensors) for name in ("softmax, flash over lengths", "softmax, flash varlen")
    )
    torch.testing.assert_close(ours, theirs)


def test_a_contender_that_cannot_train_is_left_out(monkeypatch):
    def broken(query, key, value):
        raise RuntimeError("no such kernel")

    ours, softmax = speed_contenders(CASE, "cpu")
    others = [ours, Contender("broken", "softmax", broken), softmax]
    monkeypatch.setattr(training_speed, "speed_contenders", lambda case, device: others)
    speeds, failed = measure_case("eager", CASE, 1, "cpu", rounds=1, steps=1)
    assert [each.name for each in speeds] == [ours.name, softmax.name]
    assert failed == {"broken": "RuntimeError('no such kernel')"}


def test_whoever_measures_a_case_compiles_each_contender_by_itself(monkeypatch):
    """Without it SDPA's backends would be one and the same; the tests on a GPU had once forgotten it."""
    ours, softmax = speed_contenders(CASE, "cpu")
    found = []

    def attend(query, key, value):
        found.append(torch._functorch.config.enable_autograd_cache)
        return softmax.attend(query, key, value)

    contenders = [ours, Contender("asking", "softmax", attend)]
    monkeypatch.setattr(training_speed, "speed_contenders", lambda case, device: contenders)
    before = torch._functorch.config.enable_autograd_cache
    measure_case("eager", CASE, 1, "cpu", rounds=1, steps=1)
    assert before
    assert set(found) == {False}


def test_the_exit_status_tells_that_ours_failed(monkeypatch, tmp_path, capsys):
    def broken(query, key, value):
        raise RuntimeError("no such kernel")

    _, softmax = speed_contenders(CASE, "cpu")
    others = [Contender("sigmoid, broken", "ours", broken), softmax]
    monkeypatch.setattr(training_speed, "speed_contenders", lambda case, device: others)
    assert main([*TINY, "--cases", "eager, n 32", "--out", str(tmp_path)]) == 1
    assert "Failed: eager, n 32, sigmoid, broken: RuntimeError" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE, PADDED, PACKED])
def test_compiled_contenders_of_one_function_keep_their_own_code(case, monkeypatch):
    """Alike for dynamo's guards but for the compiler: each is compiled once, and for all blocks."""
    *_, ours, softmax = speed_contenders(case, "cpu")
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


@pytest.mark.slow
def test_compiled_contenders_keep_their_own_backend():
    """The graphs are equal, and inductor's cache would give both what was compiled first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _, softmax = speed_contenders(CASE, "cpu")
    torch._dynamo.reset()
    found = []
    with contenders_compile():
        for choice in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            contender = Contender(choice.name, "softmax", softmax.attend, partial(sdpa_kernel, choice))
            step = SharedTraining(CASE, 1, "cpu").step_of(contender, "compiled", "inductor")
            step()
            with torch.profiler.profile() as profile:
                step()
            found.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert found == [True, False]


def test_attention_in_a_step_is_its_own_kernels(monkeypatch):
    times = {
        "step": Counter({"flash": 20.0, "gemm": 60.0, "void at::native::copy": 15.0}),
        "attention": Counter({"flash": 2.0, "void at::native::copy": 0.5}),
    }
    monkeypatch.setattr(training_speed, "gpu_times", lambda function, calls: (times[function()], 1))
    found = times_on_gpu(lambda: "step", lambda: "attention", num_layers=12)
    assert (found.alone, found.step, found.in_step) == (30.0, 95.0, 20.0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("padding", "is_packed", "count"), [(0.0, False, 6), (0.5, False, 7), (0.5, True, 4)]
)
def test_every_contender_trains_on_a_gpu(mode, padding, is_packed, count):
    case = Case(2, 2, 256, 64, padding=padding, is_packed=is_packed)
    speeds, failed = measure_case(mode, case, 1, "cuda", rounds=1, steps=1)
    assert not failed
    for each in speeds:
        assert 0 < each.attention_in_step < each.gpu_milliseconds, each
    assert len(speeds) == len(speed_contenders(case, "cuda")) == count


def test_the_plan_has_every_case():
    names = [case_name(mode, case) for mode, case in PRESETS["160m"].cases]
    assert len(set(names)) == 12
    for mode, case in PRESETS["160m"].cases:
        assert sum(case.valid_lengths) == (8192 if case.padding else 16384), mode


def test_bad_flags(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--cases", "compiled*"])
    assert "no case matches compiled*; there are: eager, n 32;" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*TINY, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "training_speed:" in capsys.readouterr().err
