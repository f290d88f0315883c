from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.cell_pool import synthetic_pool
from experiments.cell_transformer import MECHANISMS
from experiments.gene_ranks import RankedCells
from experiments.representation_plan import SCALES, best_rate, run_config, selection_runs
from experiments.representation_training import training_of

POOL = synthetic_pool(num_genes=60, num_train=40, num_validation=12)


def config(mechanism="sigmoid", **changes):
    made = run_config("tiny", "none", mechanism, "final", seed=0, learning_rate=1e-2)
    return replace(made, **changes)


def run(training, losses):
    """Runs with given validation losses in place of the model's."""
    remaining = iter(losses)
    training.validate = lambda: next(remaining)
    return training.run(time.monotonic() + 60)


def test_the_lowest_loss_is_kept_and_patience_ends_it(tmp_path):
    with training_of(config(), POOL, "cpu", tmp_path / "best.pt") as training:
        weights = {}
        save = torch.save

        def saved(state, path):
            weights[training.step] = {name: each.clone() for name, each in state.items()}
            save(state, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", saved)
            assert run(training, [5.0, 4.0, 4.5, 4.0, 9.9])
        # Looks at 0, 5, 10, 15: two after the best, and an equal loss is none.
        assert training.step == 15
        assert (training.best_step, training.best_loss) == (5, 4.0)
        assert list(weights) == [0, 5]
        last = training.model.state_dict()["head_bias"].clone()
        training.load_best()
        assert torch.equal(training.model.state_dict()["head_bias"], weights[5]["head_bias"])
        assert not torch.equal(last, weights[5]["head_bias"])


def test_steps_end_it_too(tmp_path):
    with training_of(config(), POOL, "cpu", tmp_path / "best.pt") as training:
        assert run(training, [5.0, 4.0, 3.0, 2.0, 1.0])
        assert (training.step, training.best_step) == (20, 20)


def test_a_loss_that_is_no_number_is_never_best(tmp_path):
    with training_of(config(), POOL, "cpu", tmp_path / "best.pt") as training:
        assert run(training, [5.0, math.nan, math.nan])
        assert (training.best_step, training.step) == (0, 10)


def test_time_ends_a_piece(tmp_path):
    with training_of(config(), POOL, "cpu", tmp_path / "best.pt") as training:
        assert not training.run(time.monotonic() - 1)
        assert training.step == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_embedding_is_the_mean_of_the_cells_own_tokens(tmp_path, mechanism):
    with training_of(config(mechanism, precision="float32"), POOL, "cpu", tmp_path / "b") as training:
        cells = training.task.validation
        embeddings = training.embed(cells)
        for i in (0, 7):
            genes = cells.genes[i : i + 1, : cells.lengths[i]]
            alone = training.embed(RankedCells(genes, cells.lengths[i : i + 1]))
            assert np.allclose(alone[0], embeddings[i], atol=1e-5)
            states = training.model.states(torch.from_numpy(genes.astype(np.int64)), None)
            assert np.allclose(states[0].mean(dim=0).detach(), embeddings[i], atol=1e-5)


def test_every_hidden_gene_counts_once(tmp_path):
    with training_of(config(precision="float32"), POOL, "cpu", tmp_path / "best.pt") as training:
        batches = training.task.validation_batches(4)
        summed, count = 0.0, 0
        for batch in batches:
            summed += training.task.loss(training.model, batch).item() * len(batch.genes)
            count += len(batch.genes)
        assert training.validate() == pytest.approx(summed / count, rel=1e-5)


def test_the_plan():
    for scale, settings in SCALES.items():
        grid = selection_runs(scale, "gut", "softmax")
        assert [run.learning_rate for run in grid] == list(settings.learning_rates)
        assert {run.purpose for run in grid} == {"selection"}
        other = selection_runs(scale, "gut", "sigmoid")
        assert [replace(run, mechanism="softmax", name="") for run in other] == [
            replace(run, name="") for run in grid
        ]
    assert not {run.seed for run in grid} & set(range(10))
    assert best_rate({3e-3: 1.0, 1e-3: 1.0}) == 1e-3


def test_the_models_of_the_plan_have_five_million_parameters(tmp_path):
    made = run_config("full", "none", "softmax", "final", seed=0, learning_rate=1e-3)
    pool = synthetic_pool(num_genes=1511, num_train=8, num_validation=4)  # the smallest data set's genes
    with training_of(made, pool, "cpu", tmp_path / "best.pt") as training:
        assert training.model.parameter_counts()["total"] > 5_000_000


@pytest.mark.gpu
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_training_on_a_gpu(tmp_path, mechanism):
    made = run_config("full", "none", mechanism, "final", seed=0, learning_rate=1e-3)
    pool = synthetic_pool(num_genes=500, num_train=64, num_validation=16)
    with training_of(replace(made, steps=100), pool, "cuda", tmp_path / "best.pt") as training:
        assert training.run(time.monotonic() + 60)
        losses = [loss for _, loss in training.validation]
        assert losses[-1] < losses[0]
        assert np.isfinite(training.embed(training.task.validation)).all()
        print(f"{mechanism}: {training.step / training.seconds:.0f} steps a second")
