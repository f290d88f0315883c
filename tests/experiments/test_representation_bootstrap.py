from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import embedding_metrics
from experiments.representation_bootstrap import cell_intervals, cell_scores
from experiments.representation_results import RawRun
from experiments.run_records import RecordedRun


def raw(mechanism="softmax", seed=0, *, spread=1.0, groups=None, loss=2.0) -> RawRun:
    generator = np.random.default_rng(seed)
    types = np.array(["a"] * 60 + ["b"] * 20 + ["alone"])
    points = generator.normal(scale=spread, size=(81, 4))
    points[60:80, 0] += 5
    hidden = np.arange(1, 82)
    arrays = {
        "embeddings": points, "embeddings_centre": np.array([1.0, 0, 0, 0]), "labels": types,
        "losses": loss * hidden, "hidden": hidden,
    }  # fmt: skip
    if groups is not None:
        arrays["groups"] = np.arange(81) % groups
    facts = {"config": {"dataset": "gut", "mechanism": mechanism, "purpose": "final", "seed": seed}}
    return RawRun(facts, RecordedRun(facts, [], {}), arrays)


def test_scores_of_cells_make_up_the_metrics():
    run = raw()
    found = {name: (scores @ share) / share.sum() for name, (scores, share) in cell_scores(run).items()}
    values = embedding_metrics(*(run.arrays[name] for name in ("embeddings", "labels", "embeddings_centre")))
    for name in ("silhouette", "cohesion"):
        assert found[name] == pytest.approx(values[name])
    assert found["held_out_loss"] == pytest.approx(2.0)


def test_intervals_hold_the_difference_and_do_not_shrink_with_the_seeds():
    runs = [raw(mechanism, seed, spread=s) for mechanism, s in (("softmax", 1.0), ("sigmoid", 0.5))
            for seed in range(4)]  # fmt: skip
    found = cell_intervals(runs)
    assert 0 < found["silhouette"]["gut"].low < found["silhouette"]["gut"].high
    assert (found["cohesion"]["gut"].unit, found["cohesion"]["gut"].count) == ("cells", 81)
    assert found["held_out_loss"]["gut"].low == found["held_out_loss"]["gut"].high == 0.0
    twice = [*runs, *(raw(run.config["mechanism"], 10 + run.config["seed"], spread=0.5) for run in runs)]
    assert cell_intervals(twice)["silhouette"]["gut"] != found["silhouette"]["gut"]


@pytest.mark.parametrize(("groups", "expected"), [(20, ("groups", 20)), (4, ("cells", 81))])
def test_donors_are_drawn_where_there_are_enough(groups, expected):
    found = cell_intervals([raw(groups=groups), raw("sigmoid", groups=groups, spread=0.5)])
    interval = found["silhouette"]["gut"]
    assert (interval.unit, interval.count) == expected


def test_seeds_without_a_partner_have_no_say():
    assert cell_intervals([raw(), raw("sigmoid", seed=1)]) == {}
