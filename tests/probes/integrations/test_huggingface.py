"""The Trainer of transformers with probes: the same training, and everything a probe is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probes
from probes.sinks import JsonLinesSink
from stability.divergence import Alert

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from probes.integrations.huggingface import ProbeCallback  # noqa: E402

# Real failures of ours are warnings, and so is a divergence that no test planted.
pytestmark = [
    pytest.mark.filterwarnings("error::probes.ProbeWarning"),
    pytest.mark.filterwarnings("error::probes.DivergenceWarning"),
]


def tiny_llama(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_dropout=dropout,
        )
    )


class Classifier(nn.Module):
    """A model that knows nothing of `num_items_in_batch`, so that the Trainer averages over batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def samples(count: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(directory: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-3,
        **options,
    }
    return Trainer(
        model=tiny_llama() if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=samples(64),
        eval_dataset=samples(4),
    )


def watch(trainer: Trainer, **options: Any) -> ProbeCallback:
    callback = ProbeCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback


def records_of(callback: ProbeCallback, quantity: str) -> dict[tuple[int, str], float]:
    assert callback.probe is not None
    return {(r.step, r.layer): r.value for r in callback.probe.records if r.quantity == quantity}


class Poison(TrainerCallback):
    """Makes one weight NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                kwargs["model"].model.layers[1].mlp.up_proj.weight[0, 0] = math.nan


class At(TrainerCallback):
    """Raises an exception at one of the Trainer's events, before a step ends."""

    def __init__(self, event: str, error: BaseException) -> None:
        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise error

        setattr(self, event, act)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny_llama, {}),
        (tiny_llama, {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}),
        (Classifier, {"gradient_accumulation_steps": 3, "optim": "sgd", "max_grad_norm": 0.1}),
    ],
    ids=["llama", "bfloat16 and evaluation", "other model"],
)
def test_training_is_bitwise_the_same(
    tmp_path: Path, model: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    results = []
    for is_watched in (False, True):
        trainer = build(tmp_path / str(is_watched), model(), **options)
        if is_watched:
            watch(trainer, log_dir=tmp_path / "run", details_every=2, activations_every=1)
        trainer.train()
        losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
        results.append((trainer.model.state_dict(), losses, torch.get_rng_state()))
    (bare, bare_losses, bare_rng), (watched, watched_losses, watched_rng) = results
    for name, tensor in bare.items():
        assert torch.equal(tensor, watched[name]), name
    assert bare_losses == watched_losses
    assert len(bare_losses) == 6
    assert torch.equal(bare_rng, watched_rng)


@pytest.mark.parametrize("model", [tiny_llama, Classifier])
def test_the_loss_of_each_optimizer_step_is_the_one_the_trainer_logs(
    tmp_path: Path, model: Callable[[], nn.Module]
) -> None:
    # 10 samples: the last step of an epoch accumulates one batch instead of two.
    trainer = build(tmp_path, model())
    trainer.train_dataset = samples(10)
    callback = watch(trainer)
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    recorded = records_of(callback, "loss")
    assert [step for step, _ in recorded] == list(range(6))
    assert list(recorded.values()) == pytest.approx(logged, rel=1e-3)  # the Trainer rounds what it logs
    assert callback.probe is not None
    assert callback.probe.is_closed


def test_the_gradient_norm_is_what_the_optimizer_receives(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_grad_norm=1e9)
    callback = watch(trainer)
    trainer.train()
    logged = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    recorded = [value for (_, layer), value in records_of(callback, "grad_norm").items() if layer == "(all)"]
    assert recorded == pytest.approx(logged, rel=1e-5)


def test_evaluation_is_not_recorded(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = build(tmp_path, Classifier(), max_steps=3, **options)
        callback = watch(trainer, activations_every=1, details_every=1)
        trainer.train()
        assert callback.probe is not None
        found.append(callback.probe.records)
    assert found[0] == found[1]


def test_a_resumed_training_goes_on_with_steps_and_detectors(tmp_path: Path) -> None:
    whole = watch(build(tmp_path / "whole"))
    whole._trainer.train()
    first = build(tmp_path / "parts", save_strategy="steps", save_steps=3)
    watch(first)
    first.train()
    second = watch(build(tmp_path / "parts"))
    second._trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert whole.probe is not None
    assert second.probe is not None
    assert {r.step for r in second.probe.records} == {3, 4, 5}
    expected = [r for r in whole.probe.records if r.step >= 3]
    # Only what is due at a step's number is recorded, so the series are those of the whole training.
    assert second.probe.records == expected
    assert second.probe.state_dict() == whole.probe.state_dict()


def test_a_checkpoint_without_a_probe_is_resumed_at_its_step(tmp_path: Path) -> None:
    build(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    trainer = build(tmp_path, save_strategy="steps", save_steps=6)
    callback = watch(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert {step for step, _ in records_of(callback, "loss")} == {3, 4, 5}
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()


@pytest.mark.parametrize("step", [3, 5])
def test_alerts_reach_report_to_and_the_log_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = build(tmp_path, report_to=["tensorboard"])
    trainer.add_callback(Poison(step))
    callback = watch(trainer, on_divergence="ignore")
    trainer.train()
    assert callback.probe is not None
    alert: Alert = callback.probe.alerts[0]
    assert (alert.kind, alert.step, alert.layer) == ("non-finite", step, "model.layers.1.mlp.up_proj")
    tag = f"alert/non-finite/{alert.layer}"
    (log,) = (log for log in trainer.state.log_history if tag in log)
    assert (log["step"], log[tag]) == (step + 1, 2.0)
    assert "train_runtime" in trainer.state.log_history[-1]  # the loggers are still there then
    files = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in files.Scalars(f"train/{tag}")] == [(step + 1, 2.0)]
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "checkpoint"), [({}, 0), ({"save_strategy": "steps", "save_steps": 4}, 6)]
)
def test_an_incident_names_the_last_checkpoint_that_exists(
    tmp_path: Path, options: dict[str, Any], checkpoint: int
) -> None:
    trainer = build(tmp_path, **options)
    trainer.add_callback(Poison(2))
    watch(trainer, log_dir=tmp_path / "run", on_divergence="ignore")
    trainer.train()
    assert (tmp_path / f"checkpoint-{checkpoint}").exists() == bool(checkpoint)
    assert probes.load_rng_states(tmp_path / "run" / "incidents" / "step-000006-exit") == checkpoint


@pytest.mark.parametrize("step", [3, 5])
def test_divergence_raised_from_the_training_closes_the_probe(tmp_path: Path, step: int) -> None:
    trainer = build(tmp_path)
    trainer.add_callback(Poison(step))
    callback = watch(trainer, on_divergence="raise")
    with pytest.raises(
        probes.DivergenceError, match=rf"step {step}: divergence in model\.layers\.1\.mlp\.up_proj"
    ):
        trainer.train()
    assert callback.probe is not None
    assert callback.probe.is_closed
    probes.attach(trainer.model).close()  # nothing watches the model any more


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("on_step_begin", KeyboardInterrupt()),
        ("on_substep_end", RuntimeError("no memory")),
        ("on_epoch_end", RuntimeError("no data")),
    ],
)
def test_an_exception_closes_the_probe_with_an_incident(
    tmp_path: Path, event: str, error: BaseException
) -> None:
    trainer = build(tmp_path, max_steps=3 if event == "on_epoch_end" else 6)
    trainer.add_callback(At(event, error))
    callback = watch(trainer, log_dir=tmp_path / "run", sinks=[JsonLinesSink(tmp_path / "run.jsonl")])
    with pytest.raises(type(error)):
        trainer.train()
    assert callback.probe is not None
    assert callback.probe.is_closed
    assert {r.step for r in callback.probe.records} >= {0, 1, 2}
    assert len(list((tmp_path / "run" / "incidents").iterdir())) == 1
    assert len(probes.read(tmp_path / "run.jsonl")["loss/(all)"].steps) == 3


def test_a_trainer_trains_twice(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=2)
    callback = watch(trainer)
    trainer.train()
    first = callback.probe
    trainer.train()
    assert callback.probe is not first
    assert {step for step, _ in records_of(callback, "loss")} == {0, 1}


@pytest.mark.slow
def test_a_compiled_model_is_watched(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, Classifier(), max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"
    )
    callback = watch(trainer, activations_every=1)
    trainer.train()
    assert {layer for _, layer in records_of(callback, "activation_rms")} == {"embed", "head"}


def test_options_are_those_of_attach(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    watch(trainer, layers="no.such.layer")
    with pytest.raises(ValueError, match=r"no\.such\.layer"):
        trainer.train()


def test_callbacks_that_are_made_anew_are_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint"):
        ProbeCallback(trainer)
