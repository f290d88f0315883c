"""The callbacks of trainers, which start the process group themselves.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler

from probes import Probe
from probes.integrations.lightning import ProbeCallback as LightningCallback
from tests.probes.distributed.launch import Result, leave, run_scenarios
from tests.probes.distributed.trainings import EVERYTHING, as_rows
from tests.probes.integrations import test_huggingface, test_lightning


def huggingface(directory: Path) -> Result:
    """A training, and again from its checkpoint on."""
    found = []
    for checkpoint in (None, str(directory / "checkpoint-3")):
        trainer = test_huggingface.build(
            directory, test_huggingface.tiny_llama(dropout=0.0), save_strategy="steps", save_steps=3
        )
        callback = test_huggingface.watch(trainer, **EVERYTHING)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(_result(callback.probe))
    whole, again = found
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"whole": whole, "again": again, "losses": losses}


def huggingface_alerts(directory: Path) -> Result:
    """A weight breaks."""
    trainer = test_huggingface.build(directory)
    trainer.add_callback(test_huggingface.Poison(3))
    log_dir = directory / f"huggingface-{os.environ['RANK']}"
    callback = test_huggingface.watch(trainer, on_divergence="ignore", log_dir=log_dir)
    trainer.train()
    told = [log for log in trainer.state.log_history if any("alert" in name for name in log)]
    return {**_result(callback.probe), "told": told}


def lightning(directory: Path) -> Result:
    """A training, and again from its checkpoint on."""
    whole = _lightning_probe(directory / "whole", max_epochs=2)
    _lightning_probe(directory / "parts", max_epochs=1, enable_checkpointing=True)
    (checkpoint,) = (directory / "parts").rglob("*.ckpt")
    again = _lightning_probe(directory / "parts", checkpoint, max_epochs=2)
    return {"whole": _result(whole), "again": _result(again)}


def lightning_alerts(directory: Path) -> Result:
    """A weight breaks."""
    callback = LightningCallback(
        on_divergence="ignore", log_dir=directory / f"lightning-{os.environ['RANK']}"
    )
    test_lightning.fit(
        directory / "broken",
        callback,
        test_lightning.At(2, test_lightning.poison),
        devices=2,
        strategy="ddp",
        logger=CSVLogger(directory / f"csv-{os.environ['RANK']}", name="csv"),
    )
    return _result(callback.probe)


def _lightning_probe(directory: Path, checkpoint: Path | None = None, **options: Any) -> Probe | None:
    callback = LightningCallback(**EVERYTHING)
    trainer = test_lightning.trainer(
        directory,
        callback,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,  # Lightning's own shuffles
        **options,
    )
    samples = test_lightning.loader().dataset
    sampler = DistributedSampler(samples, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(
        test_lightning.Automatic(dropout=0.0),
        DataLoader(samples, batch_size=4, sampler=sampler),
        ckpt_path=checkpoint,
    )
    return callback.probe


def _result(probe: Probe | None) -> Result:
    assert probe is not None
    return {"records": as_rows(probe), "alerts": list(map(str, probe.alerts)), "state": probe.state_dict()}


if __name__ == "__main__":
    run_scenarios(globals())
    leave()
