from __future__ import annotations

import math

import pytest
import torch

from experiments.detection_faults import Fault, Injector, cast_with_overflow
from experiments.detection_models import SETUPS
from experiments.detection_recording import build, record, train
from experiments.detection_suite import Run

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
        rounded = cast_with_overflow(x, dtype, 2.0)
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
