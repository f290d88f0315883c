from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from experiments.paired_comparison import Comparison, claim_sentence, compare, holm, overall


def comparison(name: str, softmax: float, difference: float, p: float = 0.5) -> Comparison:
    return Comparison(name, softmax, softmax + difference, difference, 0.0, 0.0, p, 10)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1, and never falling.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_counts_what_could_not_be_tested():
    adjusted = holm([0.02, float("nan")])
    assert adjusted[0] == pytest.approx(0.04)
    assert np.isnan(adjusted[1])


def test_interval_and_p_value_are_those_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    values = {name: (generator.normal(size=10), generator.normal(0.3, size=10)) for name in "abc"}
    found = compare(values)
    raw = [stats.ttest_rel(sigmoid, softmax) for softmax, sigmoid in values.values()]
    assert [each.p for each in found] == pytest.approx(holm([test.pvalue for test in raw]))
    for each, test in zip(found, raw, strict=True):
        interval = test.confidence_interval(1 - 0.05 / 3)
        assert (each.low, each.high) == pytest.approx((interval.low, interval.high))


def test_intervals_are_wider_in_a_larger_family():
    pair = {"a": (np.zeros(5), np.arange(5.0))}
    (alone,), (of_six,) = compare(pair), compare(pair, family=6)
    assert of_six.low < alone.low < alone.difference < alone.high < of_six.high


def test_data_sets_yet_to_come_count_in_holms_correction():
    values = {"a": (np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.6, 3.4]))}
    (alone,), (of_six,) = compare(values), compare(values, family=6)
    assert of_six.p == pytest.approx(6 * alone.p)


def test_too_few_seeds_decide_nothing():
    (single,) = compare({"a": (np.array([1.0]), np.array([2.0]))})
    assert np.isnan([single.low, single.high, single.p]).all()
    assert single.verdict == "undecided"


def test_equal_differences():
    (same,) = compare({"a": (np.arange(3.0), np.arange(3.0))})
    assert (same.difference, same.low, same.high, same.verdict) == (0, 0, 0, "undecided")
    (shifted,) = compare({"a": (np.arange(3.0), np.arange(3.0) + 1)})
    assert (shifted.low, shifted.p, shifted.verdict) == (1, 0, "higher")


def test_overall_is_a_ratio_of_means_that_a_silhouette_near_zero_does_not_rule():
    found = overall([comparison("a", 0.4, 0.04), comparison("b", 0.001, 0.01)])
    assert found.relative == pytest.approx(0.05 / 0.401)
    assert found.low < found.relative < found.high
    assert found.difference == pytest.approx(0.025)
    assert found.difference_low < 0 < found.difference_high


def test_overall_interval_by_hand():
    found = overall([comparison("a", 1.0, 0.3), comparison("b", 1.0, 0.1), comparison("c", 1.0, 0.2)])
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))


@pytest.mark.parametrize(("mean", "is_judged"), [(-0.1, False), (0.0499, False), (0.05, True)])
def test_no_share_of_a_mean_near_zero(mean, is_judged):
    assert np.isfinite(overall([comparison("a", mean, 0.1)]).relative) == is_judged


@pytest.mark.parametrize(
    ("differences", "direction", "size", "expected"),
    [
        ((0.30, 0.31, 0.32), "higher", 0.25, "the claim of 25% higher is reached"),
        ((0.10, 0.11, 0.12), "higher", 0.25, "the claim of 25% higher is excluded"),
        ((0.0, 0.3, 0.6), "higher", 0.25, "the claim of 25% higher is neither reached nor excluded"),
        ((-0.10, -0.11, -0.12), "lower", 0.0, "the claim of lower is reached"),
        ((0.10, 0.11, 0.12), "lower", 0.0, "the claim of lower is excluded"),
        ((-0.10, -0.11, -0.12), "higher", 0.0, "the claim of higher is excluded"),
    ],
)
def test_claims(differences, direction, size, expected):
    comparisons = [comparison(name, 1.0, value) for name, value in zip("abc", differences, strict=True)]
    assert expected in claim_sentence("Metric", comparisons, direction=direction, size=size)


def test_a_claim_names_data_sets_and_never_decides_on_one():
    sentence = claim_sentence("Metric", [comparison("gut", 1.0, 0.5, p=0.01)], direction="higher")
    assert sentence.startswith(
        "Metric: sigmoid +0.5000 against softmax's mean of 1.0000 (a single data set, "
    )
    assert "which decides nothing), +50.0%, so that" in sentence
    assert "neither reached nor excluded; higher in 1 (gut), lower in none, undecided in none" in sentence


@pytest.mark.parametrize(
    ("differences", "answer"), [((0.01, 0.011, 0.012), "reached"), ((-0.01, 0.0, 0.01), "neither")]
)
def test_near_zero_only_the_difference_is_judged(differences, answer):
    comparisons = [comparison(name, 0.01, value) for name, value in zip("abc", differences, strict=True)]
    sentence = claim_sentence("Metric", comparisons, direction="higher", size=0.25)
    assert "of which no share is taken, that mean being below 0.05" in sentence
    assert f"so that the claim of higher is {answer}" in sentence


def test_what_is_not_judged_near_zero_is_told():
    comparisons = [comparison(name, 0.01, 0.01) for name in "abc"]
    sentence = claim_sentence("Metric", comparisons, direction="higher", size=0.25)
    assert "below 0.05 (25% higher is not judged then), so that the claim of higher" in sentence
    assert "not judged" not in claim_sentence("Metric", comparisons, direction="higher")


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_no_difference_at_all_is_on_neither_side(direction):
    """A share of connected cells may be 1 for all."""
    sentence = claim_sentence("Metric", [comparison(n, 1.0, 0.0) for n in "abc"], direction=direction)
    assert f"the claim of {direction} is neither reached nor excluded" in sentence


@pytest.mark.parametrize(("size", "claim"), [(0.0, "higher"), (0.25, "25% higher")])
def test_a_value_that_is_no_number_is_named_and_decides_nothing(size, claim):
    comparisons = [
        comparison(name, 1.0, value) for name, value in zip("abc", (0.3, np.nan, 0.3), strict=True)
    ]
    sentence = claim_sentence("Metric", comparisons, direction="higher", size=size)
    assert sentence.startswith("Metric: no mean is told, as a value of b is no finite number, so that")
    assert f"the claim of {claim} is neither reached nor excluded" in sentence
    assert "nan" not in sentence
    assert "below" not in sentence
