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


def test_overall_interval_by_hand():
    found = overall([comparison("a", 1.0, 0.3), comparison("b", 1.0, 0.1), comparison("c", 1.0, 0.2)])
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))


def test_overall_of_a_mean_that_is_not_positive():
    assert np.isnan(overall([comparison("a", -0.1, 0.1)]).relative)


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
    sentence = claim_sentence(
        "Metric",
        [comparison("gut", 1.0, 0.5, p=0.01)],
        direction="higher",
    )
    assert sentence.startswith("Metric: sigmoid +50.0% against softmax")
    assert "a single data set, which decides nothing" in sentence
    assert "neither reached nor excluded; higher in 1 (gut), lower in none, undecided in none" in sentence


def test_a_claim_without_a_positive_mean():
    sentence = claim_sentence("Metric", [comparison("gut", -1.0, 0.5)], direction="higher", size=0.25)
    assert "not defined" in sentence
