"""What is given up, and what is then missing of a step."""

from __future__ import annotations

import pytest

import probes
from probes.guard import Guard, is_lost
from probes.pending import Pending
from probes.record import series_of


def test_a_measurement_that_fails_is_not_tried_again() -> None:
    pending = Pending()
    guard, tried = Guard(pending), []

    def failing(number: int) -> None:
        tried.append(number)
        raise RuntimeError("bug")

    with pytest.warns(
        probes.ProbeWarning, match="measuring gradients failed at step 0 and is given up"
    ) as told:
        guard("gradients", failing, 1)
        guard("gradients", failing, 2)
        guard("weights", tried.append, 3)
    assert tried == [1, 3]
    assert len(told) == 1
    assert pending.take().given_up == {"gradients"}
    assert pending.given_up == {"gradients"}  # in the next step too


@pytest.mark.parametrize(
    ("given_up", "lost"),
    [
        (
            "gradients",
            {
                *("grad_norm", "grad_max_abs", "nonfinite_count", "activation_grad_norm"),
                *("_input_grad_norm", "_output_grad_norm"),
            },
        ),
        ("weights", {"weight_norm"}),
        ("updates", {"_update_norm"}),
        ("attention", {"attention/entropy"}),
        ("layer Jacobians", {"layer_jacobian/spectral"}),
        (
            "outputs of a",
            {"activation_rms", "activation_max_abs", "activation_grad_norm", "_output_grad_norm"},
        ),
        ("inputs of a", {"_input_grad_norm", "_output_grad_norm"}),
        ("the size of outputs of a", {"activation_rms", "activation_max_abs"}),
        ("outputs of b", set()),
        ("inputs of b", set()),
    ],
)
def test_what_is_lost(given_up: str, lost: set[str]) -> None:
    quantities = {
        *(
            "grad_norm",
            "grad_max_abs",
            "nonfinite_count",
            "activation_grad_norm",
            "weight_norm",
            "_update_norm",
        ),
        *("_input_grad_norm", "_output_grad_norm"),
        *("attention/entropy", "layer_jacobian/spectral", "activation_rms", "activation_max_abs", "loss"),
    }
    assert {q for q in quantities if is_lost(series_of("a", q), {given_up})} == lost
    assert not any(is_lost(series_of("a", q), ()) for q in quantities)
