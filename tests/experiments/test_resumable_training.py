from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import resumable_training
from experiments.cell_pool import CellPool, synthetic_pool
from experiments.long_run import task_of
from experiments.resumable_training import ResumableTraining
from experiments.run_config import RunConfig

FOREVER = math.inf
FUSED = {"embed_dim": 128, "num_heads": 2}  # heads of 64, which the fused kernels take


@pytest.fixture(scope="module")
def pool() -> CellPool:
    return synthetic_pool(num_genes=40, num_train=30, num_validation=4)


def config(**changes) -> RunConfig:
    values = {"preset": "tiny", "precision": "float32", "tokens": 24, "steps": 10, "batch_size": 2}
    return RunConfig("test", **{"mechanism": "softmax", "warmup_steps": 3, **values, **changes})


def train(pool: CellPool, run: RunConfig, steps: int | None = None, device: str = "cpu") -> ResumableTraining:
    """A training that was stopped after so many steps, or finished; its probe stays attached."""
    training = ResumableTraining(run, task_of(run, pool), device)
    stop = type("Stop", (Exception,), {})

    def on_step(done: int) -> None:
        if done == steps:
            raise stop

    with suppress(stop):
        training.run(FOREVER, on_step)
    return training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mechanism": "sigmoid", "task": "values", "clip_norm": 0.5},
        {"precision": "bfloat16", "schedule": "cosine", "task": "counts"},
    ],
    ids=["ranks", "values", "counts"],
)
def test_ten_steps_are_four_and_a_resumed_six(pool, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(resumable_training, "VALIDATE_EVERY", 2)
    run = config(**changes)
    straight = train(pool, run)
    first = train(pool, run, steps=4)
    first.save(tmp_path / "run.pt")
    first.probe.close()
    torch.manual_seed(123)  # whatever ran in between
    second = ResumableTraining(run, task_of(run, pool), "cpu")
    second.load(tmp_path / "run.pt")
    assert second.step == 4
    assert second.run(FOREVER)
    for training in (straight, second):
        training.probe.close()
    assert straight.validation == second.validation
    for (name, one), two in zip(
        straight.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    for name, array in straight.table.arrays().items():
        np.testing.assert_array_equal(array, second.table.arrays()[name], err_msg=name)


def test_time_that_is_up_ends_a_piece(pool):
    training = ResumableTraining(config(), task_of(config(), pool), "cpu")
    with training.probe:
        assert not training.run(time.monotonic())
    assert training.step == 0


def test_a_loss_that_is_no_number_ends_the_run(pool):
    run = config(learning_rate=1e30, warmup_steps=0, steps=50, task="values")
    training = train(pool, run)
    training.probe.close()
    assert 1 < training.step < 50
    assert not math.isfinite(training.table.last_loss)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("task", "gain"), [("ranks", 0.05), ("values", 0.2)])
def test_what_is_learned_goes_beyond_the_reference(mechanism, task, gain):
    pool = synthetic_pool(num_genes=80, num_train=1000, num_validation=32)
    run = config(
        mechanism=mechanism, task=task, learning_rate=1e-2, steps=150, clip_norm=1.0, tokens=64, batch_size=16
    )
    training = train(pool, run)
    training.probe.close()
    reference, (*_, (_, last)) = training.task.reference, training.validation
    assert (reference - last if task == "ranks" else 1 - last / reference) > gain


def test_every_step_and_every_layer_is_recorded(pool):
    training = train(pool, config())
    training.probe.close()
    arrays = training.table.arrays()
    assert np.unique(arrays["step"]).tolist() == list(range(10))
    for quantity in ("grad_norm", "attention/entropy", "activation_rms", "adam_update_rms"):
        assert quantity in str(arrays["names"])


def test_validation_leaves_no_record(pool, monkeypatch):
    monkeypatch.setattr(resumable_training, "VALIDATE_EVERY", 1)
    often = train(pool, config())
    monkeypatch.setattr(resumable_training, "VALIDATE_EVERY", 100)
    once = train(pool, config())
    for training in (often, once):
        training.probe.close()
    assert (len(often.validation), len(once.validation)) == (10, 1)
    np.testing.assert_array_equal(often.table.arrays()["value"], once.table.arrays()["value"])


def test_a_checkpoint_of_another_run_is_refused(pool, tmp_path):
    first = train(pool, config(), steps=1)
    first.save(tmp_path / "run.pt")
    first.probe.close()
    other = replace(config(), learning_rate=0.5, seed=3)
    with (training := ResumableTraining(other, task_of(other, pool), "cpu")).probe:
        with pytest.raises(ValueError, match=r"another configuration \(learning_rate, seed differ\)"):
            training.load(tmp_path / "run.pt")


def test_rates():
    constant = config(learning_rate=2.0, warmup_steps=4)
    assert [constant.rate(step) for step in (0, 3, 9)] == [0.5, 2.0, 2.0]
    assert config(learning_rate=2.0, warmup_steps=0).rate(0) == 2.0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_on_a_gpu_a_resumed_run_goes_on(pool, tmp_path, mechanism, precision):
    run = config(mechanism=mechanism, precision=precision, steps=12, model=FUSED)
    straight = train(pool, run, device="cuda")
    first = train(pool, run, steps=5, device="cuda")
    first.save(tmp_path / "run.pt")
    first.probe.close()
    second = ResumableTraining(run, task_of(run, pool), "cuda")
    second.load(tmp_path / "run.pt")
    assert second.run(FOREVER)
    for training in (straight, second):
        training.probe.close()
    assert second.validation[0][1] == pytest.approx(straight.validation[0][1], rel=2e-2)
    steps = second.table.arrays()["step"]
    assert np.unique(steps).tolist() == list(range(12))


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["ranks", "values"])
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_a_step_never_waits_for_the_gpu(pool, mechanism, task):
    run = config(mechanism=mechanism, precision="autocast", task=task, steps=30, model=FUSED)
    training = train(pool, run, steps=3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            training._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.probe.close()
    assert math.isfinite(training.table.last_loss)
