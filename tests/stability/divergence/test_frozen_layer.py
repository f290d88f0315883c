from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import probes
from stability.divergence import Alert, EpisodeDetector, FrozenLayerDetector
from tests.stability.divergence.series import Step
from tests.stability.divergence.series import verdicts as heard

DETAILS_EVERY = 200


def records(details_every: int = DETAILS_EVERY, **sizes: Sequence[float]) -> list[tuple[int, Step]]:
    """Of Adam step sizes by layer, a record each so many steps."""
    return [
        (details_every * i, {"adam_update_rms": dict(zip(sizes, values, strict=True))})
        for i, values in enumerate(zip(*sizes.values(), strict=True))
    ]


def verdicts(**sizes: Sequence[float]) -> list[Alert]:
    return heard(FrozenLayerDetector(), records(**sizes))


def test_a_frozen_layer_is_told_once_with_the_step_since_when() -> None:
    (alert,) = verdicts(mlp=[1.0, 0.01, *[3e-5] * 6], head=[1.0, *[0.5] * 7])
    assert (alert.layer, alert.kind, alert.onset_step, alert.step) == ("mlp", "frozen-layer", 400, 800)
    assert "3e-05 of full size since step 400" in alert.reason
    assert "1 of 2 layers" in alert.reason
    assert alert.remedies


def test_the_first_to_freeze_is_told_first() -> None:
    alerts = verdicts(early=[1.0, 0.5, *[1e-5] * 4], late=[1.0, *[1e-5] * 5], head=[1.0, *[0.5] * 5])
    assert [(alert.layer, alert.onset_step, alert.step) for alert in alerts] == [
        ("late", 200, 600),
        ("early", 400, 800),
    ]


def test_of_several_the_first_to_freeze_is_the_origin() -> None:
    # The head has learned long enough only when both are frozen.
    head = [1.0, 0.05, *[0.5] * 4]
    (alert,) = verdicts(early=[1.0, 0.5, *[1e-5] * 4], late=[1.0, *[1e-5] * 5], head=head)
    assert (alert.layer, alert.onset_step, alert.step, alert.spread) == ("late", 200, 800, ("early",))


def test_a_layer_that_thaws_and_freezes_again_is_told_twice() -> None:
    mlp = [*[1e-5] * 3, 0.1, *[1e-5] * 3]
    assert [alert.step for alert in verdicts(mlp=mlp, head=[1.0] * 7)] == [400, 1200]


def mlps(num_records: int) -> dict[str, list[float]]:
    """Twelve that freeze, three a record from the second one on, beside a head that learns."""
    sizes = {
        f"blocks.{i}.mlp": [1e-5 if record > i // 3 else 1.0 for record in range(num_records)]
        for i in range(12)
    }
    return {**sizes, "head": [1.0] * num_records}


def test_every_layer_is_named_once_those_of_a_record_by_one_alert() -> None:
    alerts = verdicts(**mlps(12))
    assert [(alert.step, alert.layer, alert.onset_step) for alert in alerts] == [
        (600, "blocks.0.mlp", 200),
        (800, "blocks.3.mlp", 400),
        (1000, "blocks.6.mlp", 600),
        (1200, "blocks.9.mlp", 800),
    ]
    assert [alert.spread for alert in alerts[:2]] == [
        ("blocks.1.mlp", "blocks.2.mlp"),
        ("blocks.4.mlp", "blocks.5.mlp"),
    ]
    assert ["; 12 of 13 layers." in alert.reason for alert in alerts] == [False, False, False, True]


def test_layers_that_join_within_a_hundred_steps_are_not_told_one_by_one() -> None:
    detector = EpisodeDetector([FrozenLayerDetector()])
    (alert,) = heard(detector, records(50, **mlps(12)))
    assert alert.spread == ("blocks.1.mlp", "blocks.2.mlp")
    assert detector.episode is not None
    assert detector.episode.spread == tuple(f"blocks.{i}.mlp" for i in range(1, 12))


def test_a_layer_that_thaws_and_freezes_again_beside_a_frozen_one_is_told_once() -> None:
    mlp = [*[1e-5] * 3, 0.1, *[1e-5] * 3]
    (alert,) = verdicts(mlp=mlp, other=[1e-5] * 7, head=[1.0] * 7)
    assert (alert.layer, alert.spread) == ("mlp", ("other",))


def test_a_layer_joins_only_while_others_learn() -> None:
    alerts = verdicts(
        early=[1.0, *[1e-5] * 9],
        late=[*[1.0] * 3, *[1e-5] * 7],
        head=[*[1.0] * 4, *[0.05] * 3, *[1.0] * 3],
    )
    assert [(alert.layer, alert.step) for alert in alerts] == [("early", 600), ("late", 1800)]


def test_who_resumes_within_an_episode_hears_of_new_layers_alone() -> None:
    series = records(**mlps(12))
    detector, resumed = FrozenLayerDetector(), FrozenLayerDetector()
    assert len(heard(detector, series[:5])) == 2
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert [alert.layer for alert in heard(resumed, series[5:])] == ["blocks.6.mlp", "blocks.9.mlp"]


def test_records_without_a_gradient_say_nothing() -> None:
    mlp = [1e-5, 0.0, 1e-5, 0.0, 1e-5, 0.0, 1e-5]
    assert [alert.step for alert in verdicts(mlp=mlp, head=[1.0] * 7)] == [800]


@pytest.mark.parametrize(
    ("mlp", "head"),
    [
        ([1.0, *[1e-5] * 2, 0.1, *[1e-5] * 2], [1.0] * 6),  # two records of its own
        ([1.0, *[2e-3] * 5], [1.0] * 6),  # small, as clean runs are
        ([1.0, *[1e-5] * 5], [1.0, *[0.05] * 5]),  # no layer learns much
        ([1.0, *[1e-5] * 5], [1.0, 0.5, 0.05, 0.5, 0.05, 0.5]),  # nor for long
        ([0.0] * 6, [1.0] * 6),  # no gradient at all: another detector's
        ([float("nan")] * 6, [1.0] * 6),
    ],
)
def test_quiet(mlp: list[float], head: list[float]) -> None:
    assert not verdicts(mlp=mlp, head=head)


def test_a_network_that_has_learned_its_samples_by_heart_is_quiet() -> None:
    """Its gradients fall by orders of magnitude, in some layers and batches sooner than in others."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 20)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    hidden = [layer for _ in range(7) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), *hidden, nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with probes.attach(model, optimizer, detectors=[FrozenLayerDetector()], details_every=50) as probe:
        for _ in range(600):
            batch = torch.randint(256, (32,))
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 1e-2
    assert not probe.alerts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit must lie between 0 and 0.01, .* got 0.0"),
        ({"limit": 0.5}, "limit must lie between 0 and 0.01, .* got 0.5"),
        ({"num_records": 0}, "num_records must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenLayerDetector(**arguments)


def test_of_layers_that_freeze_together_the_first_is_named_whichever_had_a_gradient_first() -> None:
    detector = FrozenLayerDetector()
    alerts = []
    for record in range(5):
        frozen = 1.0 if record == 0 else 1e-5
        sizes = {"first": 0.0 if record == 0 else frozen, "second": frozen, "head": 0.5}
        alerts += detector.update(200 * record, {"adam_update_rms": sizes})
    (alert,) = alerts
    assert (alert.layer, alert.spread, alert.onset_step) == ("first", ("second",), 200)


def test_a_layer_that_is_recorded_no_longer_is_not_told() -> None:
    detector = FrozenLayerDetector()
    for record in range(12):
        sizes = {"head": 0.05 if record < 6 else 0.5}  # alive only when the other one has gone
        if record < 3:
            sizes["gone"] = 1e-5
        assert not detector.update(200 * record, {"adam_update_rms": sizes})


def test_a_layer_that_is_trained_no_longer_does_not_count_as_one_that_learns() -> None:
    # The head was alive until it was taken out of training; then everything has been learned.
    detector = FrozenLayerDetector()
    for record in range(12):
        sizes = {"head": 1.0, "body": 1.0} if record < 4 else {"body": 1e-5}
        assert not detector.update(200 * record, {"adam_update_rms": sizes})
