from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from experiments.cell_pool import CellPool, synthetic_pool
from experiments.cell_transformer import MECHANISMS
from experiments.cells import Cells
from experiments.gene_ranks import RankedCells
from experiments.gpu_time import gpu_times
from experiments.representation_plan import run_config
from experiments.representation_training import training_of

POOL = synthetic_pool(num_genes=60, num_train=40, num_validation=12)


def config(mechanism="sigmoid", **changes):
    made = run_config("tiny", "none", mechanism, "final", seed=0, learning_rate=1e-2)
    return replace(made, **changes)


def run(training, losses, on_step=lambda step: None):
    """Runs with given validation losses in place of the model's."""
    remaining = iter(losses)
    training.validate = lambda: next(remaining)
    return training.run(time.monotonic() + 60, on_step)


def test_the_lowest_loss_is_kept_and_patience_ends_it():
    with training_of(config(), POOL, "cpu") as training:
        biases = {}

        def keep(step):
            biases[step] = training.model.state_dict()["head_bias"].clone()

        assert run(training, [5.0, 4.0, 4.5, 4.0, 9.9], keep)
        # Looks at 0, 5, 10, 15: two after the best, and an equal loss is none.
        assert training.step == 15
        assert (training.best_step, training.best_loss) == (5, 4.0)
        training.take_best()
        assert torch.equal(training.model.state_dict()["head_bias"], biases[5])
        assert not torch.equal(biases[5], biases[15])


def test_steps_end_it_too():
    with training_of(config(), POOL, "cpu") as training:
        assert run(training, [5.0, 4.0, 3.0, 2.0, 1.0])
        assert (training.step, training.best_step) == (20, 20)


def test_a_loss_that_is_no_number_is_never_best():
    with training_of(config(), POOL, "cpu") as training:
        assert run(training, [5.0, math.nan, math.nan])
        assert (training.best_step, training.step) == (0, 10)


def test_time_ends_a_piece():
    with training_of(config(), POOL, "cpu") as training:
        assert not training.run(time.monotonic() - 1)
        assert training.step == 0


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_embedding_is_the_mean_of_the_cells_own_tokens(mechanism):
    with training_of(config(mechanism, precision="float32"), POOL, "cpu") as training:
        cells = training.task.validation
        embeddings = training.embed(cells)
        for i in (0, 7):
            genes = cells.genes[i : i + 1, : cells.lengths[i]]
            alone = training.embed(RankedCells(genes, cells.lengths[i : i + 1]))
            assert np.allclose(alone[0], embeddings[i], atol=1e-5)
            states = training.model.states(torch.from_numpy(genes.astype(np.int64)), None)
            assert np.allclose(states[0].mean(dim=0).detach(), embeddings[i], atol=1e-5)


def test_every_hidden_gene_counts_once():
    with training_of(config(precision="float32"), POOL, "cpu") as training:
        batches = training.task.validation_batches(4)
        summed, count = 0.0, 0
        for batch in batches:
            summed += training.task.loss(training.model, batch).item() * len(batch.genes)
            count += len(batch.genes)
        assert training.validate() == pytest.approx(summed / count, rel=1e-5)


def test_every_cell_has_its_loss():
    with training_of(config(precision="float32"), POOL, "cpu") as training:
        losses, counts = training.cell_losses(training.task)
        assert len(losses) == len(counts) == 12
        (cells, batch) = training.task.looks()[0]
        each = training.task.hidden_losses(training.model, batch)
        rows = batch.hidden // batch.tokens.shape[1]
        assert losses[cells[0]] == pytest.approx(each[rows == 0].sum().item(), rel=1e-5)
        assert counts[cells[0]] == (rows == 0).sum()


def test_the_best_weights_are_in_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    with training_of(config(), POOL, "cpu") as training:
        training.validate = iter([5.0, 4.0, 9.0]).__next__
        assert not training.run(time.monotonic() + 60, lambda step: step == 11 and training.stop())
        training.save(path)
        training.take_best()
        best = training.model.state_dict()["head_bias"].clone()
    with training_of(config(), POOL, "cpu") as again:
        again.load(path)
        assert again.best_step == 5
        again.take_best()
        assert torch.equal(again.model.state_dict()["head_bias"], best)


def test_a_run_without_a_finite_loss_has_diverged():
    with training_of(config(), POOL, "cpu") as training:

        def break_it(step):
            if step == 7:
                with torch.no_grad():
                    training.model.head_bias.fill_(math.nan)

        assert training.run(time.monotonic() + 60, break_it)
        assert training.is_diverged
        assert training.step < 20
        assert training.best_step <= 5


def test_the_models_of_the_plan_have_five_million_parameters():
    made = run_config("full", "none", "softmax", "final", seed=0, learning_rate=1e-3)
    pool = synthetic_pool(num_genes=1511, num_train=8, num_validation=4)  # the smallest data set's genes
    with training_of(made, pool, "cpu") as training:
        assert training.model.parameter_counts()["total"] > 5_000_000


def pool_of_lengths(shortest: int) -> CellPool:
    """Cells that express `shortest` to 2,400 of 10,000 genes, frequent ones more often."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, 10_001)
    rows, genes = [], []
    for row, length in enumerate(generator.integers(shortest, 2400, size=200)):
        genes.append(generator.choice(10_000, length, replace=False, p=shares / shares.sum()))
        rows.append(np.full(length, row))
    places = np.concatenate(rows), np.concatenate(genes)
    values = generator.uniform(0.1, 3, len(places[0])).astype(np.float32)
    expression = sparse.csr_matrix((values, places), shape=(200, 10_000))
    names = np.arange(10_000).astype(str)
    sides = (Cells(expression[side], names, None, "drawn") for side in (slice(160), slice(160, None)))
    return CellPool(*sides)


def step_times(training, steps: int = 50) -> str:
    """Of a step: time alone, CPU time of all threads, and what the GPU computes, from the profiler."""
    torch.cuda.synchronize()
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        training._train_step()
    torch.cuda.synchronize()
    alone, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    times, launches = gpu_times(training._train_step, steps)
    alone, cpu = 1e3 * alone / steps, 1e3 * cpu / steps
    return (
        f"{1e3 / alone:.0f} steps a second alone; a step takes {alone:.1f} ms, {cpu:.1f} ms of CPU time, "
        f"{times.total():.1f} ms of the GPU in {launches} kernels and copies, the longest:\n"
        + "\n".join(f"{each:8.3f} ms  {name[:90]}" for name, each in times.most_common(8))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shortest", [300, 2100], ids=["padded", "all-of-2048"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_training_on_a_gpu(mechanism, shortest):
    made = run_config("full", "none", mechanism, "final", seed=0, learning_rate=1e-3)
    with training_of(replace(made, steps=100), pool_of_lengths(shortest), "cuda") as training:
        assert training.run(time.monotonic() + 60)
        losses = [loss for _, loss in training.validation]
        # The lowest, not the last: in one seed of sigmoid on full cells the loss goes back up, with the
        # reference implementation as well (docs/results/2026-11-22-representations-pilot.md).
        assert min(losses) < losses[0] - 0.1
        assert np.isfinite(training.embed(training.task.validation)).all()
        print(f"\n{mechanism}, cells of {shortest} genes and more: {step_times(training)}")
