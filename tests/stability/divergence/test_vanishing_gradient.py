from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stability.divergence import VanishingGradientDetector
from tests.stability.divergence.series import LAYERS, Step, scaled, verdicts, with_fault


def test_a_layer_that_dies_is_named_with_the_step_since_when() -> None:
    fault = scaled("grad_norm", "blocks.1.mlp", lambda since: 0.0)
    (alert,) = verdicts(VanishingGradientDetector(num_steps=5), with_fault(160, 110, fault))
    assert (alert.layer, alert.kind, alert.onset_step, alert.step) == ("blocks.1.mlp", "dead-layer", 110, 114)
    assert alert.remedies


def test_of_layers_that_die_together_the_last_is_the_origin() -> None:
    def fault(readings: Step, since: int) -> None:
        for layer in LAYERS[:3]:
            readings["grad_norm"][layer] = 0.0

    (alert,) = verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))
    assert alert.layer == "blocks.1.mlp"
    assert alert.spread == ("embedding", "blocks.0.mlp")


def test_layers_that_die_later_are_told_later_and_once() -> None:
    def fault(readings: Step, since: int) -> None:
        readings["grad_norm"]["head"] = 0.0
        if since >= 20:
            readings["grad_norm"]["blocks.0.mlp"] = 0.0
        if 20 <= since < 40 or since >= 45:  # is back for a while
            readings["grad_norm"]["embedding"] = 0.0

    first, second = verdicts(VanishingGradientDetector(), with_fault(200, 110, fault))
    assert (first.layer, first.step, first.spread) == ("head", 114, ())
    assert (second.layer, second.step, second.onset_step) == ("blocks.0.mlp", 134, 130)
    assert second.spread == ("embedding",)
    assert "; 3 of 4 layers." in second.reason


def test_a_layer_joins_only_while_others_learn() -> None:
    def fault(readings: Step, since: int) -> None:
        readings["grad_norm"]["head"] = 0.0
        if since >= 20:
            readings["grad_norm"]["embedding"] = 0.0
            for layer in LAYERS[1:3]:
                readings["grad_norm"][layer] *= 1e-2

    (alert,) = verdicts(VanishingGradientDetector(), with_fault(150, 110, fault))
    assert alert.layer == "head"


def test_a_gradient_that_falls_by_orders_of_magnitude() -> None:
    fault = scaled("grad_norm", "embedding", lambda since: 1e-6)
    (alert,) = verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))
    assert (alert.layer, alert.kind) == ("embedding", "vanishing-gradient")


def test_a_batch_that_leaves_a_layer_out_is_quiet() -> None:
    fault = scaled("grad_norm", "embedding", lambda since: 0.0 if since % 3 else 1.0)
    assert not verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))


def routed(share: float, seed: int) -> Iterator[tuple[int, Step]]:
    """An expert that so many batches reach, beside a layer that all reach."""
    reached = np.random.default_rng(seed).random(1000) < share
    for step, is_reached in enumerate(reached.tolist()):
        yield step, {"grad_norm": {"expert": float(is_reached), "router": 1.0}}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.1])
def test_an_expert_that_some_batches_do_not_reach_is_quiet(share: float) -> None:
    for seed in range(3):
        assert not verdicts(VanishingGradientDetector(), routed(share, seed))


def test_steps_of_no_gradient_at_all_count_as_such() -> None:
    # Gradients are None until the first batch that reaches the expert, then zero between such batches.
    def steps() -> Iterator[tuple[int, Step]]:
        for step in range(190):
            expert = {} if step < 94 else {"expert": float(step == 94)}
            yield step, {"grad_norm": {**expert, "router": 1.0}}

    assert not verdicts(VanishingGradientDetector(), steps())


def test_an_expert_that_no_batch_reaches_any_more_is_told_by_its_own_habit() -> None:
    def steps(every: int) -> Iterator[tuple[int, Step]]:
        for step in range(600):
            is_reached = step < 300 and step % every == 0
            yield step, {"grad_norm": {"expert": float(is_reached), "router": 1.0}}

    delays = []
    for every in (2, 10):
        (alert,) = verdicts(VanishingGradientDetector(), steps(every))
        assert (alert.layer, alert.kind) == ("expert", "dead-layer")
        delays.append(alert.step - 300)
    assert 15 < delays[0] < 25
    assert 110 < delays[1] < 140


def test_a_layer_that_never_had_a_gradient_is_told_after_the_window() -> None:
    series = ((step, {"grad_norm": {"a": 0.0, "b": 1.0}}) for step in range(200))
    (alert,) = verdicts(VanishingGradientDetector(window=60), series)
    assert (alert.layer, alert.onset_step, alert.step) == ("a", 0, 59)


def test_a_training_that_has_learned_everything_is_quiet() -> None:
    def fault(readings: Step, since: int) -> None:
        readings["grad_norm"] = {layer: norm * 1e-9 for layer, norm in readings["grad_norm"].items()}

    assert not verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 10.0}, "ratio must be above 10, within which a layer counts as alive; got 10.0"),
        ({"num_steps": 0}, "num_steps at least 1; got 6.0 and 0"),
        ({"min_history": 101}, "min_history must lie in"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VanishingGradientDetector(**arguments)


def test_the_sentence_says_zero_only_since_it_was() -> None:
    def told(gradients: list[float]) -> str:
        detector = VanishingGradientDetector()
        alerts = [
            alert
            for step, gradient in enumerate(40 * [1.0] + gradients)
            for alert in detector.update(step, {"grad_norm": {"a": gradient, "b": 1.0}})
        ]
        (alert,) = alerts
        assert (alert.kind, alert.onset_step) == ("dead-layer", 40)
        return alert.reason

    assert told(5 * [0.0]).startswith("its gradient has been zero since step 40, while")
    falls_first = told([1e-4, 1e-4, 1e-5, 0.0, 0.0])
    assert falls_first.startswith("its gradient is zero, and has been out of its range since step 40, while")


@pytest.mark.parametrize("missing", [{}, {"dead": float("nan")}])
def test_a_dead_layer_that_steps_leave_out_is_told_once(missing: dict[str, float]) -> None:
    detector = VanishingGradientDetector()
    alerts = []
    for step in range(400):
        of_dead = missing if step in (150, 151, 300) else {"dead": 1.0 if step < 40 else 0.0}
        alerts += detector.update(step, {"grad_norm": {"alive": 1.0, **of_dead}})
    assert [(alert.layer, alert.step) for alert in alerts] == [("dead", 44)]


def test_negative_norms_of_other_recorders_are_passed_over() -> None:
    assert not VanishingGradientDetector().update(0, {"grad_norm": {"a": -1.0, "b": -float("inf")}})


def test_the_reference_is_the_median_that_was_judged() -> None:
    # Half of the history is 1 and half is 100 until the value of the alert itself has come.
    detector = VanishingGradientDetector()
    norms = [*8 * [1.0], *12 * [100.0], *5 * [1e-9]]
    (alert,) = verdicts(
        detector, ((step, {"grad_norm": {"a": norm, "b": 1.0}}) for step, norm in enumerate(norms))
    )
    assert (alert.layer, alert.step) == ("a", 24)
    assert alert.reference == pytest.approx(10.0)
    assert "is 1e-10 × its median" in alert.reason
