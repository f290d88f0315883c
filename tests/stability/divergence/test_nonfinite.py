from __future__ import annotations

import math

import pytest

from stability.divergence import NonFiniteDetector

NAN = math.nan


@pytest.mark.parametrize(
    ("readings", "layer", "quantity"),
    [
        # A broken weight explains everything after it.
        ({"weight_norm": {"a": 1, "b": NAN}, "activation_rms": {"a": 1, "b": NAN}}, "b", "weight_norm"),
        # Outputs break forward: the first one is the origin.
        ({"activation_rms": {"a": 1, "b": math.inf, "c": NAN}}, "b", "activation_rms"),
        # Gradients break backward: the last one is.
        ({"grad_norm": {"a": NAN, "b": NAN, "c": 1, "(all)": NAN}}, "b", "grad_norm"),
        ({"activation_grad_norm": {"a": NAN, "b": 1}}, "a", "activation_grad_norm"),
        # Every gradient broke, before the backward pass: nothing tells a layer.
        ({"loss": {"(all)": NAN}, "grad_norm": {"a": NAN, "b": NAN, "(all)": NAN}}, "(all)", "loss"),
        ({"grad_norm": {"a": NAN, "b": NAN}}, "(all)", "grad_norm"),
        ({"update_ratio": {"a": NAN, "b": NAN}, "grad_norm": {"a": 1, "b": 1}}, "(all)", "update_ratio"),
        ({"grad_norm": {"a": NAN}}, "a", "grad_norm"),
        # The root's own parameters may be used anywhere.
        ({"grad_norm": {"a": NAN, "b": NAN, "c": 1, "(root)": NAN}}, "b", "grad_norm"),
        ({"update_ratio": {"a": 1, "b": math.inf}}, "b", "update_ratio"),
        ({"adam_update_rms": {"a": NAN, "b": 1}}, "a", "adam_update_rms"),
        ({"loss": {"(all)": NAN}}, "(all)", "loss"),
        ({"loss": {"(all)": NAN}, "grad_norm": {"a": 1.0}}, "(all)", "loss"),
    ],
)
def test_it_names_the_origin(readings: dict, layer: str, quantity: str) -> None:
    (alert,) = NonFiniteDetector().update(3, readings)
    assert (alert.layer, alert.quantity, alert.severity, alert.step) == (layer, quantity, "divergence", 3)
    assert alert.kind == "non-finite"
    assert alert.onset_step == 3
    assert not math.isfinite(alert.value)


@pytest.mark.parametrize(
    ("outputs", "attention", "layer"),
    [
        # The block before is broken already: its logits are where the next one meets it.
        ({"blocks.0": NAN, "blocks.1": NAN}, {"blocks.0.attn": 1, "blocks.1.attn": NAN}, "blocks.0"),
        (
            {"blocks.0.mlp": NAN, "blocks.0": NAN, "blocks.1.attn": NAN},
            {"blocks.1.attn": NAN},
            "blocks.0.mlp",
        ),
        # Of what is measured in or around attention nothing tells whether it came before the logits.
        ({"blocks.0": 1, "blocks.1": NAN}, {"blocks.0.attn": 1, "blocks.1.attn": NAN}, "blocks.1.attn"),
        ({"a.qkv": 1, "a.out": NAN, "a": NAN}, {"a.attend": NAN, "b.attend": 1}, "a.attend"),
        ({"a.attn.query": 1, "a.attn.out": NAN, "a": NAN}, {"a.attn": NAN, "b.attn": 1}, "a.attn"),
        ({"a.norm": 1, "a.attn.query": 1, "a.out": NAN}, {"a.attn": NAN, "b.attn": 1}, "a.attn"),
        ({"qkv": NAN, "out": NAN}, {"attend": NAN, "other": 1}, "attend"),
        ({"emb": NAN, "b": NAN, "b/call_1": NAN}, {"b.attn/call_1": NAN, "b.attn": 1}, "emb"),
        ({}, {"a.attn": 1, "b.attn": NAN}, "b.attn"),
    ],
)
def test_logits_that_an_output_before_them_has_broken_are_not_the_origin(
    outputs: dict, attention: dict, layer: str
) -> None:
    (alert,) = NonFiniteDetector().update(
        3, {"attention/max_logit": attention, "activation_rms": outputs, "loss": {"(all)": NAN}}
    )
    assert alert.layer == layer


def test_the_evidence_is_what_the_layer_was_before() -> None:
    detector = NonFiniteDetector()
    for step in range(20):
        detector.update(step, {"weight_norm": {"a": 1.0 + step}})
    (alert,) = detector.update(20, {"weight_norm": {"a": math.inf}})
    assert alert.evidence[-2:] == ((19, 20.0), (20, math.inf))
    assert len(alert.evidence) <= 16


def test_a_loss_that_breaks_with_every_gradient_shows_the_loss_as_evidence() -> None:
    detector = NonFiniteDetector()
    detector.update(0, {"loss": {"(all)": 2.0}, "grad_norm": {"a": 1.0, "b": 1.0}})
    (alert,) = detector.update(1, {"loss": {"(all)": math.inf}, "grad_norm": {"a": NAN, "b": NAN}})
    assert (alert.layer, alert.quantity) == ("(all)", "loss")
    assert alert.evidence == ((0, 2.0), (1, math.inf))


@pytest.mark.parametrize("first", [{"loss": {"(all)": NAN}}, {"attention/max_logit": {"b": NAN}}, {}])
def test_where_nothing_tells_the_layer_none_is_named(first: dict) -> None:
    gradients = {"grad_norm": {"(all)": NAN, "a": NAN, "b": NAN}}
    (alert,) = NonFiniteDetector().update(3, {**first, **gradients})
    assert alert.layer == "(all)"
    assert alert.reason.endswith("outputs were not measured at this step, so the layer is not known.")
    assert "measure outputs at every step (activations_every=1)" in alert.remedies[0]


@pytest.mark.parametrize(
    "readings",
    [
        {"loss": {"(all)": NAN}, "grad_norm": {"a": NAN, "b": NAN}, "activation_rms": {"a": 1.0, "b": 1.0}},
        {"grad_norm": {"a": NAN, "b": NAN}, "activation_rms": {"a": 1.0, "b": NAN}},
        {"loss": {"(all)": NAN}, "grad_norm": {"a": 1.0, "b": NAN}},
        {"weight_norm": {"a": 1.0, "b": NAN}, "grad_norm": {"a": NAN, "b": NAN}},
        {"attention/max_logit": {"a": 1.0, "b": NAN}, "grad_norm": {"a": NAN, "b": NAN}},
        {"grad_norm": {"a": NAN}},
    ],
)
def test_where_something_tells_the_layer_no_rerun_is_asked_for(readings: dict) -> None:
    (alert,) = NonFiniteDetector().update(3, readings)
    assert "not known" not in alert.reason
    assert "activations_every" not in alert.remedies[0]


def test_an_episode_alerts_once() -> None:
    detector = NonFiniteDetector()
    steps = [1.0, NAN, NAN, 1.0, NAN]
    alerts = [len(detector.update(i, {"grad_norm": {"a": value}})) for i, value in enumerate(steps)]
    assert alerts == [0, 1, 0, 0, 1]


def test_finite_numbers_of_any_size_are_quiet() -> None:
    assert NonFiniteDetector().update(0, {"grad_norm": {"a": 1e300, "b": 0.0}}) == []
    assert (
        NonFiniteDetector().update(0, {"grad_norm": {"a": 1.7e308, "b": 1.7e308}}) == []
    )  # their sum is not
    assert NonFiniteDetector().update(0, {"attention/max_logit": {"a": -math.inf}}) == []  # no row had a key


def test_steps_that_a_scaler_skips_are_excused_until_it_can_no_longer_be_the_scale() -> None:
    detector = NonFiniteDetector(max_skipped=3)
    skipped = {"grad_norm": {"a": math.inf}, "skipped_step": {"(all)": 1.0}}
    alerts = [detector.update(step, skipped) for step in range(5)]
    assert [len(one) for one in alerts] == [0, 0, 0, 1, 0]
    assert "4 updates in a row were skipped: the loss scale is not the reason." in alerts[3][0].reason
    assert detector.update(5, {"grad_norm": {"a": 1.0}, "skipped_step": {"(all)": 0.0}}) == []
    assert detector.update(6, skipped) == []
    assert len(NonFiniteDetector().update(0, {**skipped, "loss": {"(all)": NAN}})) == 1


def test_the_sentence_names_a_logged_number_that_is_not_finite() -> None:
    readings = {"grad_norm": {"a": NAN, "b": 1.0}, "d_loss": {"(all)": math.inf}, "g_loss": {"(all)": 0.5}}
    (alert,) = NonFiniteDetector().update(7, readings)
    assert alert.reason.endswith("1 of 2 layers; d_loss, which the script logged, is inf.")
    assert not NonFiniteDetector().update(7, {"accuracy": {"(all)": NAN}})


@pytest.mark.parametrize("gradients", [{"g": NAN, "d": NAN}, {"g": 1.0, "d": NAN}])
def test_a_logged_loss_that_ceases_to_be_finite_with_gradients_is_named(gradients: dict) -> None:
    # Two optimizers: the discriminator's loss overflows, and no layer is at fault.
    detector = NonFiniteDetector()
    logged = {"accuracy": {"(all)": NAN}, "d_loss": {"(all)": 0.7}}
    assert not detector.update(0, {**logged, "grad_norm": {"g": 1.0, "d": 1.0}})
    (alert,) = detector.update(1, {**logged, "d_loss": {"(all)": math.inf}, "grad_norm": gradients})
    assert (alert.layer, alert.quantity, alert.value) == ("(all)", "d_loss", math.inf)
    assert alert.evidence == ((0, 0.7), (1, math.inf))
    assert alert.reason.startswith("d_loss, which the script logged, is inf; ")


def test_a_logged_gradient_norm_does_not_hide_the_layer_that_broke_it() -> None:
    detector = NonFiniteDetector()
    assert not detector.update(0, {"gnorm": {"(all)": 0.7}, "grad_norm": {"a": 1.0, "b": 1.0, "c": 1.0}})
    (alert,) = detector.update(1, {"gnorm": {"(all)": NAN}, "grad_norm": {"a": 1.0, "b": NAN, "c": 1.0}})
    assert (alert.layer, alert.quantity) == ("b", "grad_norm")
    assert alert.reason.endswith("1 of 3 layers; gnorm, which the script logged, is nan.")


def test_readings_that_the_caller_uses_again_do_not_change_the_past() -> None:
    detector, readings = NonFiniteDetector(), {"d_loss": {"(all)": 0.7}, "grad_norm": {"g": 1.0, "d": 1.0}}
    assert not detector.update(0, readings)
    readings["d_loss"]["(all)"] = readings["grad_norm"]["g"] = readings["grad_norm"]["d"] = NAN
    (alert,) = detector.update(1, readings)
    assert alert.quantity == "d_loss"
    assert alert.evidence[0] == (0, 0.7)


def test_a_layer_with_evidence_is_named_before_a_logged_loss() -> None:
    detector = NonFiniteDetector()
    assert not detector.update(0, {"d_loss": {"(all)": 0.7}, "grad_norm": {"g": 1.0, "d": 1.0}})
    broken = {"d_loss": {"(all)": NAN}, "activation_rms": {"g": 1.0, "d": NAN}, "grad_norm": {"g": 1.0}}
    (alert,) = detector.update(1, broken)
    assert (alert.layer, alert.quantity) == ("d", "activation_rms")


def test_a_bad_number_of_skipped_steps() -> None:
    with pytest.raises(ValueError, match="max_skipped must be at least 0; got -1"):
        NonFiniteDetector(max_skipped=-1)
