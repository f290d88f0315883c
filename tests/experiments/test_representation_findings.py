from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import METRICS
from experiments.representation_findings import LOSSES, attention_relations, compare_all, selections, verdicts
from experiments.representation_results import Judged, RawRun
from experiments.run_records import RecordedRun


def judged(dataset: str, method: str, seed: int, **values: float) -> Judged:
    return Judged(dataset, method, seed, {**dict.fromkeys((*METRICS, *LOSSES), 1.0), **values})


def tried(mechanism: str, rate: float, loss: float) -> RawRun:
    config = {"dataset": "gut", "mechanism": mechanism, "purpose": "selection", "learning_rate": rate}
    facts = {"config": config, "validation_loss": loss}
    return RawRun(facts, RecordedRun(facts, [], {}), None, None, None)


def test_pairs_are_of_one_seed_and_controls_count_in_no_family():
    runs = [
        judged(dataset, method, seed, silhouette=0.1 * seed + 0.05 * (method == "sigmoid") * (1 + seed))
        for dataset in ("gut", "blood", "lines")
        for method in ("softmax", "sigmoid")
        for seed in (3, 1, 2)
    ]
    runs.append(judged("gut", "softmax", 9, silhouette=100.0))  # without a partner
    found = {each.dataset: each for each in compare_all(runs, {"lines"})["silhouette"]}
    assert list(found) == ["gut", "blood", "lines"]
    assert found["gut"].pairs == 3
    assert found["gut"].difference == pytest.approx(0.05 * np.mean([2, 3, 4]))
    # The same numbers, alone in its family: a narrower interval, half the p-value of two.
    assert found["lines"].high < found["gut"].high
    assert found["gut"].p == pytest.approx(2 * found["lines"].p)
    sentence = verdicts(compare_all(runs, {"lines"}), {"lines"})["silhouette"]
    assert "over 2 data sets" in sentence
    assert "lines" not in sentence


def test_correlations_are_within_data_sets():
    """Between data sets entropy and silhouette rise together; within each they go apart."""
    runs = [
        judged(dataset, "softmax", seed, silhouette=offset - seed, **{"attention/entropy": offset + seed})
        for dataset, offset in (("gut", 0.0), ("blood", 100.0))
        for seed in range(5)
    ]
    row = next(row for row in attention_relations(runs) if row["outcome"] == "silhouette")
    assert (row["quantity"], row["runs"]) == ("attention/entropy", 10)
    assert row["correlation"] == pytest.approx(-1.0)


def test_constant_statistics_have_no_correlation():
    runs = [judged("gut", "sigmoid", seed, **{"attention/row_sum": 1.0}) for seed in range(5)]
    rows = attention_relations(runs)
    assert rows
    assert all(np.isnan(row["correlation"]) for row in rows)


def test_chosen_rates_and_the_edge_of_the_grid():
    runs = [tried("softmax", rate, loss) for rate, loss in ((1e-3, 5.0), (3e-3, 4.0), (1e-2, 6.0))]
    runs += [tried("sigmoid", rate, loss) for rate, loss in ((1e-3, 5.0), (3e-3, 4.0), (1e-2, 3.0))]
    softmax, sigmoid = selections(runs)
    assert (softmax["chosen"], softmax["is_edge"]) == (3e-3, False)
    assert (sigmoid["chosen"], sigmoid["is_edge"]) == (1e-2, True)
