"""Lightning's Trainer with probes: the same training, and everything a probe is told of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes

pytest.importorskip("lightning", reason="needs lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from probes.integrations.lightning import ProbeCallback

pytestmark = [
    pytest.mark.filterwarnings("error::probes.ProbeWarning"),
    pytest.mark.filterwarnings("error::probes.DivergenceWarning"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


class Automatic(LightningModule):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.head = nn.Linear(16, 4)
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.head(self.encoder(inputs).mean(dim=1)), targets)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.head(self.encoder(batch[0]).mean(dim=1))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Manual(Automatic):
    """Steps at every second batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


class TwoOptimizers(Automatic):
    """One optimizer for the encoder and one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.encoder, self.head)
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


class At(Callback):
    """Does something before the n-th batch."""

    def __init__(self, batch: int, action: Callable[[LightningModule], None]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            self.action(pl_module)


def poison(module: LightningModule) -> None:
    with torch.no_grad():
        module.head.weight[0, 0] = math.nan


def loader(batch_size: int = 4) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 5, 16, generator=generator)
    targets = torch.randint(4, (32,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size)


def trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    arguments = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": directory,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **options,
    }
    return Trainer(callbacks=list(callbacks), **arguments)


def fit(
    directory: Path, *callbacks: Callback, module: LightningModule | None = None, **options: Any
) -> LightningModule:
    checkpoint = options.pop("ckpt_path", None)
    module = Automatic() if module is None else module
    trainer(directory, *callbacks, **options).fit(module, loader(), loader(), ckpt_path=checkpoint)
    return module


def records_of(callback: ProbeCallback, quantity: str) -> dict[tuple[int, str], float]:
    assert callback.probe is not None
    return {(r.step, r.layer): r.value for r in callback.probe.records if r.quantity == quantity}


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (Automatic, {}),
        (Automatic, {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        (Automatic, {"plugins": scaled}),
        (Manual, {}),
        (TwoOptimizers, {}),
    ],
    ids=["automatic", "bfloat16, clipping, accumulation", "scaled float16", "manual", "two optimizers"],
)
def test_training_is_bitwise_the_same(
    tmp_path: Path, build: Callable[[], LightningModule], options: dict[str, Any]
) -> None:
    results = []
    for is_watched in (False, True):
        callbacks = []
        if is_watched:
            callbacks = [ProbeCallback(log_dir=tmp_path, details_every=2, activations_every=1)]
        made = {key: value() if callable(value) else value for key, value in options.items()}
        module = fit(tmp_path, *callbacks, module=build(), **made)
        results.append((module.state_dict(), module.losses, torch.get_rng_state()))
    (bare, bare_losses, bare_rng), (watched, watched_losses, watched_rng) = results
    for name, tensor in bare.items():
        assert torch.equal(tensor, watched[name]), name
    assert bare_losses == watched_losses
    assert torch.equal(bare_rng, watched_rng)


@pytest.mark.parametrize(
    ("build", "options", "batches"),
    [
        (Automatic, {}, 1),
        (Automatic, {"accumulate_grad_batches": 2}, 2),
        (Automatic, {"plugins": scaled}, 1),
        (Manual, {}, 2),
    ],
)
def test_the_loss_is_that_of_the_optimizer_step(
    tmp_path: Path, build: Callable[[], LightningModule], options: dict[str, Any], batches: int
) -> None:
    callback = ProbeCallback()
    made = {key: value() if callable(value) else value for key, value in options.items()}
    module = fit(tmp_path, callback, module=build(), **made)
    expected = torch.tensor(module.losses).view(-1, batches).mean(dim=1).tolist()
    recorded = records_of(callback, "loss")
    assert [step for step, _ in recorded] == list(range(8 // batches))
    assert list(recorded.values()) == pytest.approx(expected, rel=1e-6)
    assert callback.probe is not None
    assert callback.probe.is_closed


def test_every_quantity_is_recorded_though_the_gradients_come_within_the_step(tmp_path: Path) -> None:
    callback = ProbeCallback(attention_every=1, details_every=1)
    fit(tmp_path, callback)
    assert callback.probe is not None
    for quantity in ("grad_norm", "activation_rms", "attention/entropy", "update_ratio", "adam_update_rms"):
        assert {r.step for r in callback.probe.records if r.quantity == quantity} == set(range(8)), quantity


def test_two_optimizers_make_one_step(tmp_path: Path) -> None:
    callback = ProbeCallback()
    fit(tmp_path, callback, module=TwoOptimizers())
    norms = records_of(callback, "grad_norm")
    assert {step for step, _ in norms} == set(range(8))
    assert {layer for _, layer in norms} >= {"encoder.linear1", "head"}
    assert not records_of(callback, "loss")


def test_validation_is_not_recorded(tmp_path: Path) -> None:
    found = []
    for options in ({"limit_val_batches": 0}, {"val_check_interval": 1}):
        callback = ProbeCallback(activations_every=1)
        # Without dropout: an iterator over validation data takes a random number.
        fit(tmp_path, callback, module=Automatic(dropout=0), **options)
        assert callback.probe is not None
        found.append(callback.probe.records)
    assert found[0] == found[1]


def test_a_resumed_fit_goes_on_with_steps_and_detectors(tmp_path: Path) -> None:
    whole = ProbeCallback()
    fit(tmp_path, whole, max_epochs=2)
    options = {"enable_checkpointing": True, "max_epochs": 1}
    module = fit(tmp_path, ProbeCallback(), **options)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    rng = torch.get_rng_state()
    second = ProbeCallback()
    module = Automatic()
    torch.set_rng_state(rng)  # Lightning does not restore it
    fit(tmp_path, second, module=module, max_epochs=2, ckpt_path=checkpoint)
    assert whole.probe is not None
    assert second.probe is not None
    assert [r for r in whole.probe.records if r.step >= 8] == second.probe.records
    assert second.probe.state_dict() == whole.probe.state_dict()


def test_a_checkpoint_without_a_probe_is_resumed_at_its_step(tmp_path: Path) -> None:
    fit(tmp_path, enable_checkpointing=True)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    callback = ProbeCallback()
    fit(tmp_path, callback, max_epochs=2, ckpt_path=checkpoint)
    assert {step for step, _ in records_of(callback, "loss")} == set(range(8, 16))


def test_a_checkpoint_that_was_only_validated_is_not_resumed(tmp_path: Path) -> None:
    fit(tmp_path, ProbeCallback(), enable_checkpointing=True)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    callback = ProbeCallback()
    trainer(tmp_path, callback).validate(Automatic(), loader(), ckpt_path=checkpoint, verbose=False)
    fit(tmp_path, callback)
    assert {step for step, _ in records_of(callback, "loss")} == set(range(8))


def test_any_logger_is_given_records_and_alerts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = ProbeCallback(on_divergence="ignore")
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")]
    fit(tmp_path, callback, At(5, poison), logger=loggers, log_every_n_steps=2)
    norms = records_of(callback, "grad_norm")
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    written = {int(row["step"]): float(row["grad_norm/head"]) for row in rows if row["grad_norm/head"]}
    assert written == {step: pytest.approx(norms[step, "head"], nan_ok=True) for step in (0, 2, 4, 6)}
    assert [int(row["step"]) for row in rows if row["alert/non-finite/head"] == "2.0"] == [5]
    events = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir()))).Reload()
    assert [event.step for event in events.Scalars("alert/non-finite/head")] == [5]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 3, 5, 7]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_closes_the_probe_with_an_incident(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(module: LightningModule) -> None:
        raise error

    callback = ProbeCallback(log_dir=tmp_path / "run")
    # Lightning answers Ctrl-C by leaving the process.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(tmp_path, callback, At(3, fail))
    assert callback.probe is not None
    assert callback.probe.is_closed
    assert {r.step for r in callback.probe.records} == {0, 1, 2}
    assert len(list((tmp_path / "run" / "incidents").iterdir())) == 1


def test_divergence_raised_from_the_fit_closes_the_probe(tmp_path: Path) -> None:
    callback = ProbeCallback(on_divergence="raise")
    with pytest.raises(probes.DivergenceError, match="step 4: divergence in head"):
        fit(tmp_path, callback, At(4, poison))
    assert callback.probe is not None
    assert callback.probe.is_closed


def test_same_step_is_refused() -> None:
    with pytest.raises(ValueError, match="same_step"):
        ProbeCallback(same_step=True, on_divergence="skip")
