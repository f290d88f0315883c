from __future__ import annotations

import pytest

from stability.divergence import InitialisationDetector


def first(norms: dict[str, float]) -> list[str]:
    return [alert.layer for alert in InitialisationDetector().update(0, {"weight_norm": norms})]


@pytest.mark.parametrize("num_blocks", [2, 3, 6])
@pytest.mark.parametrize("faulty", [0, 1])
def test_the_layer_unlike_its_siblings_is_named(num_blocks: int, faulty: int) -> None:
    norms = {f"blocks.{i}.mlp": 1.0 + 0.05 * i for i in range(num_blocks)}
    assert first(norms) == []
    assert first({**norms, f"blocks.{faulty}.mlp": 10.0}) == [f"blocks.{faulty}.mlp"]


def test_a_layer_that_is_too_small() -> None:
    assert first({"blocks.0.mlp": 1.0, "blocks.1.mlp": 0.01, "blocks.2.mlp": 1.1}) == ["blocks.1.mlp"]


def test_widths_that_double_from_stage_to_stage_are_siblings_unlike_each_other() -> None:
    assert first({f"stages.{i}.conv": 2.0**i for i in range(4)}) == []


def test_layers_of_a_sequential_may_have_any_shapes() -> None:
    assert first({"0": 10.0, "2": 0.1, "fc1": 10.0, "fc2": 0.1, "layers.0": 10.0, "layers.1": 0.1}) == []


def test_only_the_first_weights_are_judged() -> None:
    detector = InitialisationDetector()
    norms = {"blocks.0.mlp": 1.0, "blocks.1.mlp": 1.0}
    assert detector.update(0, {"loss": {"(all)": 1.0}}) == []
    assert detector.update(0, {"weight_norm": norms}) == []
    assert detector.update(2, {"weight_norm": {**norms, "blocks.1.mlp": 50.0}}) == []


def test_weights_of_a_training_that_is_taken_up_are_no_first_ones() -> None:
    assert not InitialisationDetector().update(
        400, {"weight_norm": {"blocks.0.mlp": 1.0, "blocks.1.mlp": 50.0}}
    )


@pytest.mark.parametrize("arguments", [{"ratio": 1.0}, {"num_ranges": -1.0}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match="ratio must be above 1 and num_ranges at least 0"):
        InitialisationDetector(**arguments)


def test_norms_apart_by_more_than_the_range_of_float64() -> None:
    norms = {"blocks.0.mlp": 1e-300, "blocks.1.mlp": 1e300}
    (alert,) = InitialisationDetector().update(0, {"weight_norm": norms})
    assert (alert.layer, alert.value) == ("blocks.1.mlp", 1e300)
    assert alert.reference == pytest.approx(1e-300)
