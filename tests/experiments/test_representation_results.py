from __future__ import annotations

import numpy as np
import pytest

from experiments.representation_results import RawRun, attention_statistics, judge
from experiments.run_records import RecordedRun
from probes.record import Series


def raw(best_step=0, embeddings=None) -> RawRun:
    """A run whose entropy at a step is the step, recorded at each tenth from 0 on."""
    steps = np.arange(0, 601, 10, dtype=np.int32)
    series = {Series("blocks.0.attention", "attention/entropy"): (steps, steps.astype(np.float32))}
    config = {"name": "gut-softmax-seed10", "dataset": "gut", "mechanism": "softmax", "seed": 10}
    facts = {"config": {**config, "purpose": "final"}, "best_step": best_step}
    arrays = {"labels": np.array(["a", "a", "b", "b"]), "embeddings_centre": np.zeros(2)}
    if embeddings is not None:
        arrays["embeddings"] = embeddings
    return RawRun(facts, RecordedRun(facts, [], series), arrays)


@pytest.mark.parametrize(("best_step", "first", "last"), [(500, 400, 490), (50, 0, 40), (0, 0, 0)])
def test_attention_is_told_of_the_steps_before_the_weights_kept(best_step, first, last):
    """The first step is step 0: weights after 500 steps come of those to 499."""
    found = attention_statistics(raw(best_step))
    assert found == {"attention/entropy": np.arange(first, last + 1, 10).mean()}


def test_a_run_that_cannot_be_judged_is_named():
    with pytest.raises(ValueError, match="gut-softmax-seed10, embeddings: Expected finite embeddings"):
        judge(raw(embeddings=np.full((4, 2), np.nan)))
