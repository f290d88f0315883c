from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import embedding_metrics
from experiments.representation_bootstrap import cell_intervals, drawn, drawn_metrics
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


def test_a_draw_of_each_cell_once_has_the_metrics_themselves():
    run = raw()
    found = drawn_metrics(run, np.ones((81, 1)))
    values = embedding_metrics(*(run.arrays[name] for name in ("embeddings", "labels", "embeddings_centre")))
    for name in ("silhouette", "cohesion"):
        assert found[name] == pytest.approx(values[name])
    assert found["held_out_loss"] == pytest.approx(2.0)


def test_a_draw_by_hand():
    """Cells are held against those of the draw, as often as they are in it, and never against copies."""
    run = raw()
    run.arrays["losses"] = run.arrays["losses"] * np.linspace(1, 2, 81)
    times = drawn(np.arange(81))[:, :3]
    points, types = run.arrays["embeddings"], run.arrays["labels"]
    about = points - run.arrays["embeddings_centre"]
    for draw, found in zip(times.T, np.transpose(list(drawn_metrics(run, times).values())), strict=True):
        cells = np.repeat(np.arange(81), draw.astype(int))
        cells = cells[types[cells] != "alone"]
        scores, similar = [], {"a": [], "b": []}
        for i in cells:
            means = {}
            for name in "ab":
                others = [j for j in cells if types[j] == name and j != i]
                means[name] = np.mean([np.linalg.norm(points[i] - points[j]) for j in others])
                if name == types[i]:
                    similar[name] += [
                        about[i] @ about[j] / np.linalg.norm(about[i]) / np.linalg.norm(about[j])
                        for j in others
                    ]
            own, other = means.pop(types[i]), *means.values()
            scores.append((other - own) / max(own, other))
        loss = (run.arrays["losses"] @ draw) / (run.arrays["hidden"] @ draw)
        expected = np.mean(scores), np.mean([np.mean(each) for each in similar.values()]), loss
        assert found == pytest.approx(expected)


def test_types_that_a_draw_lacks_are_left_out():
    run = raw()
    times = np.ones((81, 2))
    times[61:80, 0] = 0.0  # of type b one cell, and in the other draw that cell twice
    times[60:80, 1] = [2.0, *[0.0] * 19]
    found = drawn_metrics(run, times)
    assert np.isnan(found["silhouette"]).all()
    only = raw()
    only.arrays["labels"] = np.where(only.arrays["labels"] == "a", "a", "alone")
    of_a = drawn_metrics(only, (only.arrays["labels"] == "a")[:, None].astype(float))["cohesion"]
    assert found["cohesion"] == pytest.approx(np.repeat(of_a, 2))


def test_intervals_are_as_wide_as_other_cells_make_the_difference():
    """Scores that stay as they were when other cells are drawn make them half as wide."""
    spread, widths = {}, {}
    for seed in range(60):
        pair = [raw(seed=seed), raw("sigmoid", seed, spread=1.5)]
        softmax, sigmoid = (drawn_metrics(run, np.ones((81, 1))) for run in pair)
        for name in ("silhouette", "cohesion"):
            spread.setdefault(name, []).append(float(sigmoid[name][0] - softmax[name][0]))
        if seed < 10:
            for name, found in cell_intervals(pair).items():
                widths.setdefault(name, []).append(found["gut"].high - found["gut"].low)
    for name, differences in spread.items():
        assert np.mean(widths[name]) / (2 * 1.96 * np.std(differences)) == pytest.approx(1.0, abs=0.25)


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
