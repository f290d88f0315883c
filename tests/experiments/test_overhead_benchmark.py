from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import overhead_benchmark, overhead_contenders
from experiments.overhead_benchmark import PRESETS, main, measure, parse_arguments
from experiments.overhead_contenders import BARE, Contender, contenders
from experiments.overhead_report import overheads, paired_ratio

TINY = ["--steps-per-round", "10", "--preset", "tiny", "--rounds", "2"]


def hooks_of(training) -> int:
    model, optimizer = training.model, training.optimizer
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        + len(torch.nn.modules.module._global_forward_hooks)
        + len(torch.nn.modules.module._global_forward_pre_hooks)
        + len(optimizer._optimizer_step_pre_hooks)
        + len(optimizer._optimizer_step_post_hooks)
        + sum(len(p._backward_hooks or ()) for p in model.parameters())
    )


@contextmanager
def silent(training):
    yield lambda loss: None


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("overhead")
    assert main([*TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "overhead.json").read_text())


def test_every_configuration_is_measured_in_every_round(summary):
    names = [overhead["name"] for overhead in summary["overheads"]]
    for expected in (
        "bare, a second copy",
        "detached (attached, then closed)",
        "idle (every period 0)",
        "attention_every=0",
        "defaults",
        "defaults, TensorBoard",
        "everything each step, all rows",
        "torch get_total_norm",
        "foreach norms, TensorBoard",
    ):
        assert expected in names
    assert names[0] == BARE
    assert all(len(summary["seconds_per_turn"][name]) == summary["rounds"] == 2 for name in names)


def test_summary_agrees_with_its_own_times(summary):
    seconds = {name: np.array(values) for name, values in summary["seconds_per_turn"].items()}
    for overhead in summary["overheads"]:
        ratios = seconds[overhead["name"]] / seconds[BARE]
        assert overhead["ratio"] == pytest.approx(np.median(ratios))
        assert overhead["low"] <= overhead["ratio"] <= overhead["high"]
        assert overhead["milliseconds"] == pytest.approx(100 * np.median(seconds[overhead["name"]]))
    assert summary["overheads"][0]["ratio"] == 1
    assert summary["failed_peers"] == {}
    assert summary["versions"]["torch"] == torch.__version__


def test_figure_is_drawn(out):
    assert (out / "overhead.png").read_bytes().startswith(b"\x89PNG")


def test_table_names_the_peers_that_are_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overhead_contenders, "find_spec", lambda name: None)
    assert main([*TINY, "--rounds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("95 % interval", "1 rounds of 10 steps", "Not installed: transformers Debug"):
        assert expected in printed


def test_every_configuration_trains_to_bitwise_the_same_weights(tmp_path):
    make = PRESETS["tiny"]("cpu", "softmax", 8)
    weights = {}
    for contender in contenders(tmp_path):
        if contender.name.startswith("detached"):
            continue  # it trains one step more in each turn
        training = make()
        for _ in range(2):
            with contender.watch(training) as watch:
                for _ in range(3):
                    training.step(watch)
        weights[contender.name] = torch.nn.utils.parameters_to_vector(training.model.parameters())
    for name, vector in weights.items():
        assert torch.equal(vector, weights[BARE]), name


def test_no_configuration_leaves_a_hook_to_the_next(tmp_path):
    make = PRESETS["tiny"]("cpu", "softmax", 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    num_hooks = {}
    for contender in contenders(tmp_path):
        training = make()
        before = hooks_of(training)
        with contender.watch(training) as watch:
            training.step(watch)
            num_hooks[contender.name] = hooks_of(training) - before
        assert hooks_of(training) == before, contender.name
        assert torch.nn.functional.scaled_dot_product_attention is attention, contender.name
        assert not torch.is_anomaly_enabled()
    assert num_hooks[BARE] == num_hooks["detached (attached, then closed)"] == 0
    assert num_hooks["defaults"] > 0


def test_probes_go_on_where_their_last_turn_ended(tmp_path):
    training = PRESETS["tiny"]("cpu", "softmax", 8)()
    (contender,) = (c for c in contenders(tmp_path) if c.name == "defaults, TensorBoard")
    for _ in range(2):
        with contender.watch(training) as watch:
            for _ in range(11):
                training.step(watch)
    from probes import read

    series = read(tmp_path / "probes")
    assert series["loss/(all)"].steps.tolist() == list(range(22))
    assert series["attention/entropy/blocks.0.attention"].steps.tolist() == [0, 10, 20]


def test_order_rotates_and_the_first_round_is_not_counted():
    turns = []
    competitors = [Contender(name, "ours", silent) for name in "abc"]
    seconds, failed = measure(
        competitors,
        PRESETS["tiny"]("cpu", "softmax", 8),
        rounds=3,
        steps=1,
        device="cpu",
        on_turn=turns.append,
    )
    assert "".join(turns) == "abcbcacababc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert failed == {}


def test_a_peer_that_fails_is_left_out_and_ours_is_not():
    @contextmanager
    def failing(training):
        yield lambda loss: 1 / 0

    make = PRESETS["tiny"]("cpu", "softmax", 8)
    bare = Contender(BARE, "bare", silent)
    arguments = {"rounds": 2, "steps": 1, "device": "cpu"}
    seconds, failed = measure([bare, Contender("peer", "peer", failing)], make, **arguments)
    assert failed == {"peer": "ZeroDivisionError('division by zero')"}
    assert len(seconds.pop(BARE)) == 2
    assert seconds == {}
    with pytest.raises(ZeroDivisionError):
        measure([bare, Contender("defaults", "ours", failing)], make, **arguments)


@pytest.mark.parametrize(("turn", "rounds"), [(3, 0), (8, 1)])
def test_ctrl_c_keeps_complete_rounds(turn, rounds, tmp_path, monkeypatch, capsys):
    time_turn = overhead_benchmark.time_turn
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == turn:
            raise KeyboardInterrupt
        return time_turn(*arguments)

    monkeypatch.setattr(overhead_benchmark, "time_turn", interrupted)
    monkeypatch.setattr(
        overhead_benchmark,
        "contenders",
        lambda path: [Contender(n, "bare", silent) for n in (BARE, "b", "c")],
    )
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    if rounds:
        assert json.loads((tmp_path / "overhead.json").read_text())["rounds"] == rounds
        assert "Interrupted: 1 of 2 rounds measured" in printed
    else:
        assert "nothing is measured" in printed
        assert not (tmp_path / "overhead.json").exists()


def test_cells_train_too(tmp_path):
    for mechanism in ("softmax", "sigmoid"):
        training = PRESETS["tiny-cells"]("cpu", mechanism, 1)()
        (contender,) = (c for c in contenders(tmp_path) if c.name == "everything each step, all rows")
        with contender.watch(training) as watch:
            training.step(watch)
        assert training.steps_done == 1


def test_paired_ratio_cancels_what_slows_a_whole_round():
    generator = np.random.default_rng(0)
    machine = generator.lognormal(sigma=0.5, size=200)
    noise = generator.normal(1.0, 0.01, size=200)
    ratio, low, high = paired_ratio(1.05 * machine * noise, machine)
    assert low < ratio < high
    assert ratio == pytest.approx(1.05, abs=0.005)
    assert high - low < 0.01


def test_a_rare_dear_step_shows_in_all_rounds_together_alone():
    bare, ours = [1.0] * 20, [1.0] * 19 + [3.0]
    _, measured = overheads({"bare": bare, "ours": ours}, {"bare": "bare", "ours": "ours"}, steps=10)
    assert (measured.ratio, measured.total) == (1.0, pytest.approx(1.1))


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        _, low, high = paired_ratio(generator.normal(1.0, 0.1, size=50), np.ones(50))
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 200 <= 0.995


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps-per-round", "0"], "--steps-per-round"),
        (["--rounds", "0"], "must be at least 1; got 0"),
        (["--mechanism", "sigmoid"], "--mechanism sigmoid needs --preset 160m; small is softmax"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--device", "cuda"])
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err


def test_an_unwritable_directory_is_named(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.gpu
def test_runs_on_a_gpu(tmp_path):
    assert main(["--preset", "tiny-cells", "--rounds", "1", "--device", "cuda", "--out", str(tmp_path)]) == 0
