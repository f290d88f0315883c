from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.representation_results import RawRun
from experiments.representation_scope import PLANNED, check_runs, scope_of, selections
from experiments.run_records import RecordedRun

GUT = PLANNED[1]


def raw(purpose="final", mechanism="sigmoid", *, dataset=GUT, seed=0, rate=1e-3, loss=4.0, **facts) -> RawRun:
    config = {
        "name": f"{dataset}-{mechanism}-{purpose}-{rate}-{seed}", "dataset": dataset, "mechanism": mechanism,
        "purpose": purpose, "learning_rate": rate, "seed": seed, "data_digest": facts.pop("digest", "same"),
    }  # fmt: skip
    labels = facts.pop("labels", "aabb")
    found = {
        "config": config, "validation_loss": loss, "without_attention": 5.0, "is_diverged": False,
        "is_stopped_by_patience": True, **facts,
    }  # fmt: skip
    arrays = {"labels": np.array(list(labels))} if purpose == "final" else {}
    return RawRun(found, RecordedRun(found, [], {}), arrays)


def pair(**changes) -> list[RawRun]:
    return [raw(mechanism=mechanism, **changes) for mechanism in ("softmax", "sigmoid")]


def tried(**changes) -> list[RawRun]:
    return [raw("selection", mechanism, **changes) for mechanism in ("softmax", "sigmoid")]


def test_chosen_rates_are_of_the_mean_over_seeds():
    runs = [
        raw("selection", "softmax", rate=rate, seed=seed, loss=loss)
        for rate, losses in ((1e-3, (5.0, 5.0)), (3e-3, (4.9, 4.9)), (1e-2, (3.0, 8.0)))
        for seed, loss in enumerate(losses)
    ]
    (row,) = selections(runs)
    assert (row["chosen"], row["is_edge"]) == (3e-3, False)
    (row,) = selections(runs[2:])
    assert row["is_edge"]


def test_losses_that_are_no_numbers_choose_nothing():
    runs = [raw("selection", rate=1e-3, loss=math.nan), raw("selection", rate=3e-3, loss=9.0)]
    assert selections(runs)[0]["chosen"] == 3e-3
    assert selections(runs[:1])[0]["chosen"] is None


def test_runs_that_belong_together():
    check_runs([*tried(), *pair(), *pair(seed=1)])


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (pair(), "at the learning rate that was chosen, None"),
        ([*tried(), *pair(rate=3e-3)], "chosen, 0.001; got 0.003"),
        ([*tried(), *pair(), raw(seed=1, rate=3e-3)], "got 0.003"),
        ([*tried(), raw(), raw(seed=1, digest="other")], "prepared with other cells"),
        ([*tried(digest="other"), raw()], "prepared with other cells"),
        ([*tried(), raw(), raw(seed=1, labels="abab")], "types differ"),
    ],
)
def test_runs_that_do_not(runs, message):
    with pytest.raises(ValueError, match=message):
        check_runs(runs)


def test_missing_data_sets_are_of_the_plans_six():
    scope = scope_of([*pair(), raw(dataset=PLANNED[0])])
    assert scope.planned == PLANNED
    assert len(PLANNED) == 6
    assert scope.missing == tuple(name for name in PLANNED if name != GUT)
    assert "Missing: pbmc3k_human_blood, cortexculture" in scope.remarks()


def test_a_data_set_that_lacks_a_mechanism_is_missing_and_nothing_else():
    scope = scope_of([raw()])
    assert GUT in scope.missing
    assert scope.unlearned == ()


def test_data_sets_of_ones_own_are_their_own_family():
    scope = scope_of([*pair(dataset="own"), *pair(dataset="lines", is_control=True)])
    assert (scope.planned, scope.controls, scope.missing) == (("own",), {"lines"}, ())
    assert scope.remarks() == ""


def test_both_mechanisms_must_beat_no_attention_on_the_mean():
    assert scope_of(pair(loss=4.9)).unlearned == ()
    second = [raw(mechanism="softmax", seed=1, loss=4.9), raw(seed=1, loss=5.2)]
    assert scope_of([*pair(loss=4.9), *second]).unlearned == (GUT,)
    assert scope_of([*pair(loss=4.9), *second]).remark(GUT) == " (attention learned nothing here)"


def test_seeds_that_one_mechanism_lacks_decide_nothing():
    """A lease that ends leaves more seeds of the faster mechanism: they are in no comparison either."""
    alone = [raw(seed=seed, loss=9.0, is_stopped_by_patience=False) for seed in range(1, 10)]
    scope = scope_of([*pair(), *alone])
    assert (scope.unlearned, scope.at_budget, scope.remark(GUT)) == ((), (), "")
    scope = scope_of(alone)
    assert GUT in scope.missing
    assert scope.at_budget == ()


def test_ends_by_steps_count_and_divergence_is_neither():
    patient, cut = pair(), pair(seed=1, is_stopped_by_patience=False)
    assert scope_of(patient + cut).at_budget == ()  # half of them
    assert scope_of(patient + cut + pair(seed=2, is_stopped_by_patience=False)).at_budget == (GUT,)
    diverged = pair(seed=2, is_stopped_by_patience=False, is_diverged=True)
    assert scope_of(patient + cut + diverged).at_budget == ()


def test_a_control_is_told_of_beside_its_name_and_in_no_sentence():
    control = {"dataset": "lines", "is_control": True}
    scope = scope_of([*pair(), *pair(**control, loss=9.0)])
    assert scope.remark("lines") == " (control, attention learned nothing here)"
    assert "lines" not in scope.remarks()
    scope = scope_of([*pair(), *pair(**control, is_stopped_by_patience=False)])
    assert scope.remark("lines") == " (control, at this budget)"
    assert "lines" not in scope.remarks()
    assert (scope.planned, "lines" in scope.missing) == (PLANNED, False)
    assert scope.controls_last(["lines", GUT, "lines"]) == [GUT, "lines"]
