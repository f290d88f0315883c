from __future__ import annotations

from collections.abc import Sequence

import pytest

from stability.divergence import Alert, FrozenLayerDetector

DETAILS_EVERY = 200


def verdicts(**sizes: Sequence[float]) -> list[Alert]:
    """Of Adam step sizes by layer, a record each `DETAILS_EVERY` steps."""
    detector = FrozenLayerDetector()
    return [
        alert
        for i, values in enumerate(zip(*sizes.values(), strict=True))
        for alert in detector.update(
            DETAILS_EVERY * i, {"adam_update_rms": dict(zip(sizes, values, strict=True))}
        )
    ]


def test_a_frozen_layer_is_told_once_with_the_step_since_when() -> None:
    (alert,) = verdicts(mlp=[1.0, 0.01, 3e-5, 3e-5, 3e-5, 3e-5], head=[1.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert (alert.layer, alert.kind, alert.onset_step, alert.step) == ("mlp", "frozen-layer", 400, 600)
    assert "3e-05 of full size since step 400" in alert.reason
    assert "1 of 2 layers" in alert.reason
    assert alert.remedies


def test_the_first_to_freeze_is_the_origin() -> None:
    (alert,) = verdicts(
        early=[1.0, 0.5, 1e-5, 1e-5, 1e-5],
        late=[1.0, 1e-5, 1e-5, 1e-5, 1e-5],
        head=[1.0, 0.5, 0.5, 0.5, 0.5],
    )
    assert (alert.layer, alert.onset_step, alert.step) == ("late", 200, 400)


def test_a_layer_that_thaws_and_freezes_again_is_told_twice() -> None:
    mlp = [1e-5, 1e-5, 0.1, 1e-5, 1e-5]
    assert [alert.step for alert in verdicts(mlp=mlp, head=[1.0] * 5)] == [200, 800]


@pytest.mark.parametrize(
    ("mlp", "head"),
    [
        ([1.0, 1e-5, 0.1, 1e-5, 0.1], [1.0] * 5),  # one record of its own
        ([1.0, 2e-3, 2e-3, 2e-3, 2e-3], [1.0] * 5),  # small, as clean runs are
        ([1.0, 1e-5, 1e-6, 1e-7, 1e-8], [1.0, 1e-4, 1e-5, 1e-6, 1e-7]),  # everything has been learned
        ([0.0] * 5, [1.0] * 5),  # no gradient at all: another detector's
        ([float("nan")] * 5, [1.0] * 5),
    ],
)
def test_quiet(mlp: list[float], head: list[float]) -> None:
    assert not verdicts(mlp=mlp, head=head)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit must lie between 0 and 0.1, .* got 0.0"),
        ({"limit": 0.5}, "limit must lie between 0 and 0.1, .* got 0.5"),
        ({"num_records": 0}, "num_records must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenLayerDetector(**arguments)
