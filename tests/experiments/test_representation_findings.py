from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import METRICS
from experiments.representation_findings import LOSSES, PRIMARY, attention_relations, compare_all, verdicts
from experiments.representation_results import Judged
from experiments.representation_scope import Scope

METHODS = ("softmax", "sigmoid")
SCOPE = Scope(frozenset({"lines"}), ("gut", "blood"))


def judged(dataset: str, method: str, seed: int, **values: float) -> Judged:
    return Judged(dataset, method, seed, {**dict.fromkeys((*METRICS, *LOSSES), 1.0), **values})


def test_pairs_are_of_one_seed_and_controls_count_in_no_family():
    runs = [
        judged(dataset, method, seed, silhouette=0.1 * seed + 0.05 * (method == "sigmoid") * (1 + seed))
        for dataset in ("gut", "blood", "lines")
        for method in ("softmax", "sigmoid")
        for seed in (3, 1, 2)
    ]
    runs.append(judged("gut", "softmax", 9, silhouette=100.0))  # without a partner
    found = {each.dataset: each for each in compare_all(runs, SCOPE)["silhouette"]}
    assert list(found) == ["gut", "blood", "lines"]
    assert found["gut"].pairs == 3
    assert found["gut"].difference == pytest.approx(0.05 * np.mean([2, 3, 4]))
    # The same numbers, alone in its family: a narrower interval, half the p-value of two.
    assert found["lines"].high < found["gut"].high
    assert found["gut"].p == pytest.approx(2 * found["lines"].p)
    sentence = verdicts(compare_all(runs, SCOPE), SCOPE)["silhouette"]
    assert "over 2 data sets" in sentence
    assert "lines" not in sentence


def test_what_the_scope_says_is_in_the_sentences_on_primary_metrics():
    runs = [judged(name, method, seed) for name in "ab" for method in METHODS for seed in (0, 1)]
    scope = Scope(frozenset(), tuple("abc"), missing=("c",), unlearned=("b",), at_budget=("a",))
    sentences = verdicts(compare_all(runs, scope), scope)
    assert all("a single data set" in sentence for sentence in sentences.values())
    assert "Missing" not in sentences["connectivity"]
    for sentence in (sentences[metric] for metric in PRIMARY):
        assert "Missing: c. Not counted, as attention learned nothing there: b." in sentence
        assert sentence.endswith("At this budget of steps only: a.")
    scope = Scope(frozenset(), tuple("ab"), unlearned=tuple("ab"))
    assert "no data set counts." in verdicts(compare_all(runs, scope), scope)["cohesion"]


def test_the_family_is_the_plans_whatever_is_missing():
    rng = np.random.default_rng(0)
    runs = [judged("a", method, seed, silhouette=rng.normal()) for method in METHODS for seed in range(5)]
    (alone,), (of_six,) = (
        compare_all(runs, Scope(frozenset(), tuple(names)))["silhouette"] for names in ("a", "abcdef")
    )
    assert of_six.p == pytest.approx(min(1.0, 6 * alone.p))
    assert of_six.high > alone.high


def test_correlations_are_within_data_sets():
    """Between data sets entropy and silhouette rise together; within each they go apart."""
    runs = [
        judged(dataset, "softmax", seed, silhouette=offset - seed, **{"attention/entropy": offset + seed})
        for dataset, offset in (("gut", 0.0), ("blood", 100.0))
        for seed in range(5)
    ]
    row = next(row for row in attention_relations(runs, SCOPE) if row["outcome"] == "silhouette")
    assert (row["quantity"], row["runs"]) == ("attention/entropy", 10)
    assert row["correlation"] == pytest.approx(-1.0)


def test_constant_statistics_have_no_correlation():
    runs = [judged("gut", "sigmoid", seed, **{"attention/row_sum": 1.0}) for seed in range(5)]
    rows = attention_relations(runs, SCOPE)
    assert rows
    assert all(np.isnan(row["correlation"]) for row in rows)


def test_controls_are_in_no_correlation():
    """They stand apart in every table."""
    runs = [
        judged(dataset, "softmax", seed, silhouette=sign * seed, **{"attention/entropy": 1.0 * seed})
        for dataset, sign in (("gut", 1), ("lines", -1))
        for seed in range(5)
    ]
    row = next(row for row in attention_relations(runs, SCOPE) if row["outcome"] == "silhouette")
    assert (row["runs"], row["correlation"]) == (5, pytest.approx(1.0))
