from __future__ import annotations

import pytest
import torch

from experiments.detection_faults import (
    KINDS,
)
from experiments.detection_models import learning_rate_factor
from experiments.detection_suite import FORMS, SCORING_ONLY, suite


def test_halves_are_disjoint():
    tuning, scoring = suite("tuning"), suite("scoring")
    assert not {run.seed for run in tuning} & {run.seed for run in scoring}
    # Only clean runs of the large model, with other seeds, are in both.
    assert {run.setup for run in tuning} & {run.setup for run in scoring} == {"token-d256"}
    for kind, forms in FORMS.items():
        with_strength = {form for form in forms["tuning"] if form[1]}
        assert not with_strength & set(forms["scoring"]), kind
    assert not {run.fault.kind for run in tuning if run.fault} & set(SCORING_ONLY)


def test_scoring_half_has_the_promised_size():
    runs = suite("scoring")
    assert len({run.name for run in runs}) == len(runs)
    by_kind = {kind: [run for run in runs if run.fault and run.fault.kind == kind] for kind in KINDS}
    assert min(map(len, by_kind.values())) >= 20
    assert sum(map(len, by_kind.values())) >= 300
    clean = [run for run in runs if run.fault is None]
    assert sum(run.steps for run in clean) >= 48_000
    assert sum(run.steps for run in clean if run.setup == "token-d256") >= 5_000
    assert {run.schedule for run in clean} == {"constant", "cosine", "restarts"}
    for run in runs:
        if run.fault:
            assert run.pair in clean
            assert run.fault.step == 0 or run.steps - run.fault.step >= 50


@pytest.mark.parametrize("half", ["tuning", "scoring"])
def test_suite_is_the_same_every_time_and_leaves_the_global_generators_alone(half):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert suite(half) == suite(half)
    assert torch.equal(torch.get_rng_state(), state)


def test_restarts_come_back_to_the_peak():
    factors = [learning_rate_factor("restarts", step, 700) for step in range(700)]
    assert factors[20] == factors[170] == factors[320] == 1.0
    assert min(factors[20:]) < 0.11
