from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import detection_benchmark
from experiments.detection_benchmark import judge, main, recording_path
from experiments.detection_faults import (
    KINDS,
    Fault,
    Injector,
    _rounded,
    candidate_layers,
    query_and_key,
    weight_of,
)
from experiments.detection_models import SETUPS, learning_rate_factor
from experiments.detection_recording import Recording, build, record, train
from experiments.detection_report import Result, cases, draw_figure, rows
from experiments.detection_scoring import (
    CleanBand,
    Outcome,
    Verdict,
    median,
    names_layer,
    num_episodes,
    proportion,
    rate,
    score,
)
from experiments.detection_suite import _FORMS, SCORING_ONLY, Run, suite
from stability.divergence import ALL_LAYERS, Alert, default_detectors

ONSET = 3
STEPS = 6


def run_of(setup: str, fault: Fault | None = None, steps: int = STEPS) -> Run:
    return Run(setup, 5, "constant", steps, SETUPS[setup].batch_size, fault)


def states(run: Run) -> list[dict]:
    """What a training looks like between backward pass and optimizer step, at every step."""
    model, optimizer = build(run)
    seen = []

    def watch(step: int, loss: torch.Tensor) -> None:
        state = {
            "loss": loss.item(),
            "lr": optimizer.param_groups[0]["lr"],
            "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
            "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            "optimizer": {
                name: {key: value.clone() for key, value in optimizer.state[p].items()}
                for name, p in model.named_parameters()
                if p in optimizer.state
            },
        }
        seen.append(state)

    train(run, model, optimizer, watch)
    return seen


def pair_of_states(
    kind: str, variant: str, strength: float, setup: str, layer: str | None, onset: int = ONSET
):
    run = run_of(setup, Fault(kind, variant, strength, layer, onset, seed=1))
    return states(run), states(run.pair)


def assert_equal_until_onset(faulty: list[dict], clean: list[dict]) -> None:
    for ours, theirs in zip(faulty[:ONSET], clean[:ONSET], strict=True):
        assert ours["loss"] == theirs["loss"]
        for name, gradient in ours["gradients"].items():
            assert torch.equal(gradient, theirs["gradients"][name])


def changed(faulty: dict, clean: dict, what: str) -> set[str]:
    return {
        name
        for name, tensor in faulty[what].items()
        if not torch.equal(tensor.nan_to_num(7.0), clean[what][name].nan_to_num(7.0))
    }


# What each fault does at its onset, beyond which nothing differs: the parameters it touches.


@pytest.mark.parametrize(("variant", "is_spoilt"), [("nan", torch.isnan), ("inf", torch.isinf)])
def test_one_weight_is_spoilt(variant, is_spoilt):
    faulty, clean = pair_of_states("nan-weight", variant, 0, "mlp-4-sgd", "blocks.1.linear")
    assert_equal_until_onset(faulty, clean)
    assert changed(faulty[ONSET], clean[ONSET], "weights") == {"blocks.1.linear.weight"}
    assert is_spoilt(faulty[ONSET]["weights"]["blocks.1.linear.weight"]).sum() == 1


@pytest.mark.parametrize("variant", ["nan", "inf"])
def test_one_gradient_is_spoilt(variant):
    faulty, clean = pair_of_states("nan-gradient", variant, 0, "token-2", "blocks.1.mlp.output")
    assert_equal_until_onset(faulty, clean)
    assert changed(faulty[ONSET], clean[ONSET], "weights") == set()
    assert changed(faulty[ONSET], clean[ONSET], "gradients") == {"blocks.1.mlp.output.weight"}
    gradient = faulty[ONSET]["gradients"]["blocks.1.mlp.output.weight"]
    assert (~torch.isfinite(gradient)).sum() == 1
    assert math.isfinite(faulty[ONSET]["loss"])


@pytest.mark.parametrize("setup", ["cell-softmax-2", "mlp-4-sgd", "cnn-3-sgd", "encoder-2"])
def test_a_batch_with_nan_spoils_the_loss(setup):
    faulty, clean = pair_of_states("nan-batch", "nan", 0, setup, None)
    assert_equal_until_onset(faulty, clean)
    assert changed(faulty[ONSET], clean[ONSET], "weights") == set()
    assert math.isnan(faulty[ONSET]["loss"])


def test_a_layer_is_scaled():
    faulty, clean = pair_of_states("scaled-weights", "", 20, "cell-sigmoid-2", "blocks.1.mlp.hidden")
    assert_equal_until_onset(faulty, clean)
    for name in changed(faulty[ONSET], clean[ONSET], "weights"):
        assert name.startswith("blocks.1.mlp.hidden.")
        assert torch.equal(faulty[ONSET]["weights"][name], 20 * clean[ONSET]["weights"][name])
    assert len(changed(faulty[ONSET + 1], clean[ONSET + 1], "weights")) > 2  # the training goes on from there


@pytest.mark.parametrize(
    ("setup", "layer"), [("token-2", "blocks.1.attention"), ("encoder-2", "encoder.layers.1.self_attn")]
)
def test_query_and_key_grow_at_every_step(setup, layer):
    faulty, clean = pair_of_states("qk-growth", "", 4, setup, layer)
    assert_equal_until_onset(faulty, clean)
    names = changed(faulty[ONSET], clean[ONSET], "weights")
    assert names == (
        {f"{layer}.query.weight", f"{layer}.key.weight"}
        if setup == "token-2"
        else {f"{layer}.in_proj_weight"}
    )
    for name in names:
        norms = [float(faulty[step]["weights"][name][:32].norm()) for step in range(STEPS)]
        assert norms[-1] / norms[ONSET - 1] == pytest.approx(4 ** (STEPS - ONSET), rel=0.1)
    if setup == "encoder-2":  # the value projection is left alone
        assert torch.equal(
            faulty[ONSET]["weights"][f"{layer}.in_proj_weight"][64:],
            clean[ONSET]["weights"][f"{layer}.in_proj_weight"][64:],
        )


@pytest.mark.parametrize("variant", ["query", "key"])
def test_one_projection_alone_grows(variant):
    faulty, clean = pair_of_states("entropy-collapse", variant, 2, "token-2", "blocks.0.attention")
    assert_equal_until_onset(faulty, clean)
    # (A key's bias has no effect under softmax and stays near zero, twice which is no exact zero either.)
    names = changed(faulty[ONSET], clean[ONSET], "weights")
    assert f"blocks.0.attention.{variant}.weight" in names
    assert all(name.startswith(f"blocks.0.attention.{variant}.") for name in names)


def test_sigmoid_attention_saturates_by_bias_or_growth():
    layer = "blocks.0.attention"
    by_bias, clean = pair_of_states("saturation", "bias", 3, "cell-sigmoid-2", layer)
    assert_equal_until_onset(by_bias, clean)
    assert changed(by_bias[ONSET], clean[ONSET], "weights") == {f"{layer}.query.bias", f"{layer}.key.bias"}
    by_growth, _ = pair_of_states("saturation", "growth", 3, "cell-sigmoid-2", layer)
    assert changed(by_growth[ONSET], clean[ONSET], "weights") == {
        f"{layer}.query.weight",
        f"{layer}.key.weight",
    }
    run = run_of("cell-sigmoid-2", Fault("saturation", "bias", 3, layer, ONSET), steps=11)
    readings = record(run)[0].readings
    assert readings[10]["attention/row_sum"][layer] > 5 * readings[0]["attention/row_sum"][layer]


def test_the_learning_rate_jumps_and_stays():
    faulty, clean = pair_of_states("learning-rate", "", 30, "mlp-3-adamw", None)
    assert_equal_until_onset(faulty, clean)
    for step in range(STEPS):
        assert faulty[step]["lr"] == pytest.approx(clean[step]["lr"] * (30 if step >= ONSET else 1))


@pytest.mark.parametrize("setup", ["token-2", "cell-softmax-2", "encoder-2", "mlp-4-sgd"])
def test_a_bad_batch_is_one_step(setup):
    faulty, clean = pair_of_states("bad-batch", "", 50, setup, None)
    assert_equal_until_onset(faulty, clean)
    assert changed(faulty[ONSET], clean[ONSET], "weights") == set()
    assert faulty[ONSET]["loss"] != clean[ONSET]["loss"]
    if setup != "token-2":
        assert faulty[ONSET]["loss"] > 2 * max(state["loss"] for state in clean)


@pytest.mark.parametrize("setup", ["token-2", "cell-softmax-2", "encoder-2", "cnn-3-sgd"])
def test_noisy_labels_permute_the_targets(setup):
    run = run_of(setup, Fault("label-noise", "", 0.5, None, ONSET))
    batch = next(SETUPS[setup].batches(0, 8))
    model, optimizer = build(run)
    noisy = Injector(run.fault, model, optimizer).before_forward(ONSET, batch)
    share = (noisy.targets != batch.targets).double().mean()
    assert 0.2 < share < 0.8  # half were drawn; some got a target equal to their own
    assert torch.equal(noisy.inputs, batch.inputs)
    assert_equal_until_onset(states(run), states(run.pair))


@pytest.mark.parametrize(("setup", "buffer"), [("token-2", "exp_avg_sq"), ("mlp-4-sgd", "momentum_buffer")])
@pytest.mark.parametrize(("variant", "strength"), [("scaled", 1e-6), ("scaled", 1e-3), ("nan", 0.0)])
def test_optimizer_state_is_spoilt(setup, buffer, variant, strength):
    layer = "blocks.0.mlp.hidden" if setup == "token-2" else "blocks.0.linear"
    faulty, clean = pair_of_states("optimizer-state", variant, strength, setup, layer)
    assert_equal_until_onset(faulty, clean)
    ours = {name: state[buffer] for name, state in faulty[ONSET]["optimizer"].items()}
    theirs = {name: state[buffer] for name, state in clean[ONSET]["optimizer"].items()}
    for name, tensor in ours.items():
        is_touched = name.startswith(f"{layer}.")
        assert torch.equal(tensor, theirs[name]) != is_touched
        if is_touched and variant == "nan":
            assert tensor.isnan().sum() == 1
    update = faulty[ONSET + 1]["weights"][f"{layer}.weight"] - faulty[ONSET]["weights"][f"{layer}.weight"]
    usual = clean[ONSET + 1]["weights"][f"{layer}.weight"] - clean[ONSET]["weights"][f"{layer}.weight"]
    assert update.isnan().any() if variant == "nan" else update.norm() > 5 * usual.norm()


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
@pytest.mark.parametrize(
    "setup_and_layer", [("token-2", "blocks.1.mlp.output"), ("encoder-2", "encoder.layers.1.self_attn")]
)
def test_overflow_forward_spoils_loss_and_backward_the_gradients_from_there(dtype, setup_and_layer):
    setup, layer = setup_and_layer
    forward, clean = pair_of_states("overflow", f"forward {dtype}", 2, setup, layer)
    assert_equal_until_onset(forward, clean)
    assert math.isnan(forward[ONSET]["loss"])
    backward, _ = pair_of_states("overflow", f"backward {dtype}", 2, setup, layer)
    assert_equal_until_onset(backward, clean)
    assert backward[ONSET]["loss"] == clean[ONSET]["loss"]
    broken = {name for name, g in backward[ONSET]["gradients"].items() if not g.isfinite().all()}
    assert any(name.startswith(f"{layer}.") for name in broken)
    assert not any(name.startswith("head") for name in broken)


def test_overflow_leaves_what_is_in_range_almost_alone():
    x = torch.tensor([0.1, -0.3, 1.0])
    for dtype in (torch.float16, torch.bfloat16):
        rounded = _rounded(x, dtype, 2.0)
        assert torch.allclose(rounded[:2], x[:2], rtol=1e-2)
        assert rounded[2] == math.inf


def test_initialisation_is_bad_from_the_start():
    faulty, clean = pair_of_states("initialisation", "", 30, "mlp-4-sgd", "blocks.2.linear", onset=0)
    weight = "blocks.2.linear.weight"
    assert changed(faulty[0], clean[0], "weights") == {weight}
    assert torch.equal(faulty[0]["weights"][weight], 30 * clean[0]["weights"][weight])


@pytest.mark.parametrize(
    ("setup", "layer", "what_is_dead"),
    [
        ("mlp-4-sgd", "blocks.1.linear", "blocks.1.linear.weight"),
        ("cnn-3-sgd", "blocks.1.norm", "blocks.1.conv.weight"),
        ("encoder-2", "encoder.layers.0.linear1", "encoder.layers.0.linear2.weight"),
    ],
)
def test_relus_die(setup, layer, what_is_dead):
    sudden, clean = pair_of_states("dying-relu", "sudden", 1000, setup, layer)
    assert_equal_until_onset(sudden, clean)
    assert changed(sudden[ONSET], clean[ONSET], "weights") == {f"{layer}.bias"}
    assert not sudden[ONSET]["gradients"][what_is_dead].any()
    gradual, _ = pair_of_states("dying-relu", "gradual", 10, setup, layer)
    falls = [float(gradual[step]["weights"][f"{layer}.bias"].mean()) for step in range(ONSET, STEPS)]
    assert falls == pytest.approx([-10, -20, -30], abs=1)


def test_every_kind_finds_its_layers():
    for name, setup in SETUPS.items():
        model = setup.make_model()
        attention = candidate_layers(model, "attention")
        assert bool(attention) == (not name.startswith(("mlp", "cnn")))
        for layer in attention:
            assert len(query_and_key(model.get_submodule(layer))) == 2
        for layer in candidate_layers(model, "weight"):
            assert weight_of(model.get_submodule(layer)).dim() > 1
        relus = candidate_layers(model, "relu")
        assert bool(relus) == name.startswith(("mlp", "cnn", "encoder"))
        assert candidate_layers(model, None) == [None]


# The split.


def test_halves_are_disjoint():
    tuning, scoring = suite("tuning"), suite("scoring")
    assert not {run.seed for run in tuning} & {run.seed for run in scoring}
    # Only clean runs of the large model, with other seeds, are in both.
    assert {run.setup for run in tuning} & {run.setup for run in scoring} == {"token-d256"}
    for kind, forms in _FORMS.items():
        with_strength = {form for form in forms["tuning"] if form[1]}
        assert not with_strength & set(forms["scoring"]), kind
    assert not {run.fault.kind for run in tuning if run.fault} & set(SCORING_ONLY)


def test_scoring_half_has_the_promised_size():
    runs = suite("scoring")
    assert len({run.name for run in runs}) == len(runs)
    by_kind = {kind: [run for run in runs if run.fault and run.fault.kind == kind] for kind in KINDS}
    assert min(map(len, by_kind.values())) >= 20
    assert sum(map(len, by_kind.values())) >= 300
    clean = [run for run in runs if run.fault is None]
    assert sum(run.steps for run in clean) >= 48_000
    assert sum(run.steps for run in clean if run.setup == "token-d256") >= 5_000
    assert {run.schedule for run in clean} == {"constant", "cosine", "restarts"}
    for run in runs:
        if run.fault:
            assert run.pair in clean
            assert run.fault.step == 0 or run.steps - run.fault.step >= 50


@pytest.mark.parametrize("half", ["tuning", "scoring"])
def test_suite_is_the_same_every_time_and_leaves_the_global_generators_alone(half):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert suite(half) == suite(half)
    assert torch.equal(torch.get_rng_state(), state)


def test_restarts_come_back_to_the_peak():
    factors = [learning_rate_factor("restarts", step, 700) for step in range(700)]
    assert factors[20] == factors[170] == factors[320] == 1.0
    assert min(factors[20:]) < 0.11


# Recordings.


def test_replayed_verdicts_are_those_of_an_attached_probe(tmp_path):
    faults = [
        Fault("nan-weight", "nan", 0, "blocks.1.linear", 30),
        Fault("learning-rate", "", 100, None, 30),
        Fault("scaled-weights", "", 100, "blocks.2.linear", 30),
        None,
    ]
    for fault in faults:
        run = run_of("mlp-4-sgd", fault, steps=45)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recording, live = record(run, default_detectors())
        recording.save(tmp_path / "run.npz")
        loaded = Recording.load(tmp_path / "run.npz")
        assert loaded.run == run
        assert loaded.steps == recording.steps
        assert repr(loaded.readings) == repr(recording.readings)  # order included
        assert repr(loaded.replay(default_detectors())) == repr(live)
        assert bool(live) == (fault is not None)
        assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_recording_of_another_format_is_refused(tmp_path, monkeypatch):
    Recording(run_of("mlp-4-sgd")).save(tmp_path / "run.npz")
    monkeypatch.setattr("experiments.detection_recording.FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1; expected 2. Record it again."):
        Recording.load(tmp_path / "run.npz")


# Scoring, on verdicts made by hand.

FAULT = Fault("nan-weight", "nan", 0, "blocks.1.mlp.hidden", 10)


def outcome(*verdicts: tuple[int, str], fault: Fault = FAULT, departure: int = 40) -> Outcome:
    heard = tuple(Verdict(step, step + 1, layer) for step, layer in verdicts)
    return Outcome(run_of("token-2", fault, steps=60), heard, departure)


def test_the_first_verdict_from_the_onset_counts():
    early_and_late = outcome((2, "head"), (4, "head"), (12, "blocks.1"), (13, "blocks.0"))
    assert early_and_late.num_early == 1
    assert early_and_late.detection == Verdict(12, 13, "blocks.1")
    assert (early_and_late.delay, early_and_late.lead) == (3, 27)
    assert early_and_late.is_layer_right
    missed = outcome((9, "blocks.1"))
    assert missed.detection is missed.delay is missed.lead is None
    assert not missed.is_layer_right
    assert outcome((10, "head")).delay == 1


@pytest.mark.parametrize(
    ("named", "faulty", "is_right"),
    [
        ("blocks.1.mlp.hidden", "blocks.1.mlp.hidden", True),
        ("blocks.1.mlp", "blocks.1.mlp.hidden", True),
        ("blocks.1", "blocks.1.mlp.hidden", True),
        ("blocks", "blocks.1.mlp.hidden", False),
        ("encoder.layers", "encoder.layers.0.linear1", False),
        ("encoder.layers.0", "encoder.layers.0.linear1", True),
        ("blocks.1.attention.query", "blocks.1.attention", True),
        ("blocks.1.attention/call_1", "blocks.1.attention", True),
        ("blocks.1.attention_norm", "blocks.1.attention", False),
        ("blocks.10", "blocks.1", False),
        ("(all)", "blocks.1", False),
        ("", "blocks.1", False),
        ("(all)", None, True),
        ("token_embedding", None, True),
        ("blocks.0", None, False),
        ("", None, False),
    ],
)
def test_which_layer_is_right(named, faulty, is_right):
    assert names_layer(named, faulty, SETUPS["token-2"].first_layers) == is_right


def test_episodes():
    assert num_episodes([]) == 0
    assert num_episodes([5]) == 1
    assert num_episodes([25, 5, 15]) == 1
    assert num_episodes([5, 16]) == 2


def test_clean_band_holds_clean_losses_and_departure_is_where_only_the_fault_leaves():
    generator = np.random.default_rng(0)
    trend = 2 * np.exp(-np.arange(200) / 80)
    clean = trend * np.exp(0.1 * generator.standard_normal((6, 200)))
    band = CleanBand(clean)
    fresh = trend * np.exp(0.1 * generator.standard_normal((500, 200)))
    inside = ((fresh >= band.low) & (fresh <= band.high))[:, 10:-10].mean()
    assert inside == pytest.approx(0.999, abs=0.001)
    paired = trend.copy()
    losses = trend.copy()
    losses[150:] = 5
    assert band.departure(losses, paired, 100) == 150
    assert band.departure(losses, paired, 160) == 160
    paired[150:170] = 5  # the data of these steps are hard for the clean run, too
    assert band.departure(losses, paired, 100) == 170
    losses[120] = math.nan
    assert band.departure(losses, paired, 100) == 120
    assert band.departure(trend, trend, 100) == 200


def test_intervals():
    assert proportion(0, 0).value != proportion(0, 0).value
    half = proportion(5, 10)
    assert (half.low, half.value, half.high) == pytest.approx((0.2366, 0.5, 0.7634), abs=1e-4)
    two = rate(2, 10_000)
    assert (two.low, two.value, two.high) == pytest.approx((0.2422, 2, 7.2247), abs=1e-4)
    middle = median([1, 2, 3, 4, 100])
    assert (middle.value, middle.low >= 1, middle.high <= 100) == (3, True, True)


def test_score_report_and_cases(tmp_path):
    slow = replace(FAULT, kind="qk-growth", layer="blocks.0.attention")
    outcomes = [
        outcome((10, "blocks.1")),
        outcome((12, "head")),
        outcome(),
        outcome((3, "head"), (20, "blocks.0"), fault=slow, departure=60),
    ]
    total = score(outcomes)
    assert (total.num_runs, total.recall.value, total.layer.value) == (4, 0.75, pytest.approx(2 / 3))
    assert (total.delay.value, total.lead.value) == (3, 29)
    clean = {
        run_of("token-2", steps=5000): (
            Verdict(7, 8, "head"),
            Verdict(9, 10, ALL_LAYERS),
            Verdict(90, 91, ""),
        )
    }
    result = Result("a tool", outcomes, clean)
    assert result.num_false_alarms == 2
    assert result.num_early_alarms == 1
    assert [row[0] for row in rows(result)] == ["nan-weight", "qk-growth", "slow kinds", "all"]
    assert [line.split("  ")[0] for line in cases(result)] == [
        "wrong layer",
        "missed",
        "early",
        *["false alarm"] * 3,
    ]
    draw_figure(tmp_path / "score.png", result)
    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")


# The command line, on a suite of three runs.


@pytest.fixture
def small_suite(monkeypatch):
    fault = Fault("nan-gradient", "nan", 0, "blocks.1.linear", 6)
    runs = [replace(run_of("mlp-4-sgd", steps=12), seed=seed) for seed in (1, 2)]
    runs.append(replace(runs[0], fault=fault))
    monkeypatch.setattr(detection_benchmark, "suite", lambda half: runs)
    return runs


def test_record_resumes_and_score_reports(tmp_path, small_suite, capsys):
    directory = str(tmp_path / "new")
    assert main(["record", "--half", "tuning", "--out", directory]) == 0
    paths = [recording_path(tmp_path / "new", run) for run in small_suite]
    written = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert main(["score", "--half", "tuning", "--in", directory]) == 2
    assert "1 of 3 recordings are missing" in capsys.readouterr().err
    assert main(["record", "--half", "tuning", "--out", directory]) == 0
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, written, strict=True)] == [
        True,
        False,
        True,
    ]
    assert main(["score", "--half", "tuning", "--in", directory, "--cases"]) == 0
    assert "nan-gradient" in capsys.readouterr().out
    content = json.loads((tmp_path / "new" / "score.json").read_text())
    assert content["all"]["recall"]["value"] == 1
    assert content["clean_steps"] == 24
    [told] = content["outcomes"]
    assert told["delay"] == 1
    assert told["is_layer_right"] is True
    assert "| nan-gradient | 1 | 100 %" in (tmp_path / "new" / "score.md").read_text()


def test_a_detector_of_ones_own_is_scored(small_suite):
    class Parrot:
        def update(self, step, readings):
            return [Alert(step, "head", "loss", "warning", 0.0, None, "as always")] if step == 8 else []

    recordings = {run: record(run)[0] for run in small_suite}
    result = judge(recordings, lambda: [Parrot()])
    assert result.num_false_alarms == 2
    assert result.score().recall.value == 1
    assert result.score().layer.value == 0


def test_ctrl_c_says_how_to_go_on(tmp_path, small_suite, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(detection_benchmark, "record", interrupt)
    assert main(["record", "--half", "scoring", "--out", str(tmp_path)]) == 130
    assert "goes on where it stopped" in capsys.readouterr().out
