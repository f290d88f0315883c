"""The trainers' callbacks on two ranks: numbers and alerts of one process, written by the first rank."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
pytest.importorskip("lightning", reason="needs lightning")
from probes.integrations.lightning import ProbeCallback
from tests.probes.distributed.launch import results, run
from tests.probes.distributed.test_same_numbers import assert_close
from tests.probes.distributed.trainings import EVERYTHING, Rows, as_rows
from tests.probes.integrations import test_huggingface, test_lightning

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenarios = ["huggingface", "huggingface_alerts", "lightning", "lightning_alerts"]
    return run(tmp_path_factory.mktemp("of_two"), 2, "trainers", scenarios)


def huggingface(directory: Path) -> Rows:
    """One process with the whole batch."""
    llama = test_huggingface.tiny_llama(dropout=0.0)
    trainer = test_huggingface.build(directory, llama, per_device_train_batch_size=4)
    callback = test_huggingface.watch(trainer, **EVERYTHING)
    trainer.train()
    assert callback.probe is not None
    return as_rows(callback.probe)


def lightning(directory: Path) -> Rows:
    """One process with the whole batch."""
    callback = ProbeCallback(**EVERYTHING)
    trainer = test_lightning.trainer(directory, callback, max_epochs=2)
    trainer.fit(test_lightning.Automatic(dropout=0.0), test_lightning.loader(batch_size=8))
    assert callback.probe is not None
    return as_rows(callback.probe)


@pytest.mark.parametrize("train", [huggingface, lightning])
def test_every_layer_has_the_numbers_of_one_process(
    of_two: Path, tmp_path: Path, train: Callable[[Path], Rows]
) -> None:
    first, second = results(of_two, 2, train.__name__)
    assert first["whole"] == second["whole"]
    expected = train(tmp_path)
    assert len(expected) > 500
    assert_close(first["whole"]["records"], expected, tolerance=1e-3)  # in float32


@pytest.mark.parametrize(("trainer", "saved"), [("huggingface", 3), ("lightning", 4)])
def test_a_resumed_training_goes_on_as_the_uninterrupted_one(of_two: Path, trainer: str, saved: int) -> None:
    for result in results(of_two, 2, trainer):
        whole, again = result["whole"], result["again"]
        rest = {name: row for name, row in whole["records"].items() if int(name.split()[0]) >= saved}
        assert again["records"] == rest
        assert again["state"] == whole["state"]


def test_the_loss_is_the_one_the_trainer_logs(of_two: Path) -> None:
    first = results(of_two, 2, "huggingface")[0]
    recorded = [row[0] for name, row in first["whole"]["records"].items() if "loss/(all)" in name]
    assert recorded == pytest.approx(first["losses"], rel=1e-3)  # the Trainer rounds what it logs


@pytest.mark.parametrize(
    ("trainer", "alert"),
    [
        ("huggingface", "step 3: divergence in model.layers.1.mlp.up_proj: its weights hold nan"),
        ("lightning", "step 2: divergence in head: its weights hold nan"),
    ],
)
def test_all_ranks_see_an_alert_and_the_first_writes(of_two: Path, trainer: str, alert: str) -> None:
    first, second = results(of_two, 2, f"{trainer}_alerts")
    assert first["alerts"] == second["alerts"]
    assert [told.startswith(alert) for told in first["alerts"]] == [True]
    written = of_two / f"{trainer}-0"
    assert (written / "flight_recorder.bin").exists()
    assert list(written.glob("events.out.tfevents.*"))
    assert list(written.glob("incidents/*/report.html"))
    assert not (of_two / f"{trainer}-1").exists()


def test_the_first_rank_logs_alerts_to_the_trainers_loggers(of_two: Path) -> None:
    first, second = results(of_two, 2, "huggingface_alerts")
    (log,) = first["told"]
    assert (log["step"], log["alert/non-finite/model.layers.1.mlp.up_proj"]) == (4, 2.0)
    assert second["told"] == []
    (path,) = of_two.glob("csv-0/**/metrics.csv")
    with path.open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["alert/non-finite/head"]]
    assert steps == [2]
    assert not (of_two / "csv-1").exists()
