from __future__ import annotations

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


def test_a_gradient_that_falls_by_orders_of_magnitude() -> None:
    fault = scaled("grad_norm", "embedding", lambda since: 1e-6)
    (alert,) = verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))
    assert (alert.layer, alert.kind) == ("embedding", "vanishing-gradient")


def test_a_batch_that_leaves_a_layer_out_is_quiet() -> None:
    fault = scaled("grad_norm", "embedding", lambda since: 0.0 if since % 3 else 1.0)
    assert not verdicts(VanishingGradientDetector(), with_fault(160, 110, fault))


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
