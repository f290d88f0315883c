"""Attaching probes to a model."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from probes.alerts import AlertAction, OnDivergence
from probes.arguments import check_count, check_flag, check_log_dir, check_members
from probes.delivery import Delivery
from probes.detector_quantities import check_quantities
from probes.distributed import join_ranks, told_of, unwrapped
from probes.failures import ProbeWarning
from probes.flight_recorder import FlightRecorder, set_aside
from probes.flight_recorder_file import FILE_NAME
from probes.incident import IncidentWriter, environment
from probes.layers import select_layers
from probes.probe import Probe
from probes.schedule import Schedule
from probes.sessions import EarlierSession
from probes.sinks.sink import Sink
from probes.sinks.taken import check_sinks_are_free, take_sinks
from probes.sinks.tensorboard import HParam, TensorBoardSink, check_hparams
from probes.snapshots import Snapshots
from stability.divergence import Detector, default_detectors
from stability.module_calls import is_compiled, layer_names

_open_probes: dict[nn.Module, Probe] = {}

DEFAULT_ATTENTION_EVERY = 10


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    log_dir: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    layers: str | Sequence[str] = "*",
    every: int = 1,
    activations_every: int = 10,
    details_every: int = 200,
    attention_every: int | None = None,
    attention_rows: int | None = 64,
    on_divergence: OnDivergence = "warn",
    detectors: Sequence[Detector] | None = None,
    layer_jacobian_every: int = 0,
    flight_recorder: int = 512,
    same_step: bool = False,
    snapshot_every: int = 100,
    hparams: Mapping[str, HParam] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Probe:
    """Watches a model while it trains, layer by layer, without changing it.

    Values, gradients and updates stay bitwise what they are without the probe; it only looks. Nothing is
    recorded of forward passes under ``torch.no_grad``. A measurement or a sink that fails is given up with
    one warning, and the training goes on.

    Args:
        model: The model. With ``torch.compile``, attach first and compile then.
        optimizer: The optimizer, or several: a step ends when the last of them has stepped. One that is
            replaced later is warned of; attach anew. Without one, call ``probe.step()`` after each backward
            pass; updates are then not recorded.
        log_dir: Directory for TensorBoard events, the flight recorder and incident folders of this run. None
            keeps records in memory only. Of what an earlier run left there, :func:`probes.read` leaves out
            all from the first step of this one on.
        sinks: Further places for records, such as :class:`probes.sinks.JsonLinesSink`.
        layers: Shell-style pattern or patterns of module names, as in ``model.named_modules()``.
        every: Records gradient and weight norm of every layer at each n-th optimizer step; 0: never.
        activations_every: The same for the outputs of blocks and the gradients there. Blocks are the elements
            of the outermost ``nn.ModuleList`` or ``nn.Sequential``; of a model without, its children.
        details_every: The same for the outputs of every layer and the gradients there, largest entries,
            counts of what is not finite, and updates.
        attention_every: The same for attention statistics. None: every 10th step of models that have
            attention. With a number, a model without attention is an error.
        attention_rows: Query rows sampled per sequence and head for attention statistics; None: all.
        on_divergence: What an alert does: "ignore", "warn" (once per kind), "raise"
            (:class:`probes.DivergenceError`, for divergence; warnings still warn) or a function given the
            :class:`~stability.divergence.Alert`. Verdicts come one recorded step late. With ``same_step``
            also "skip" (the update of a step that diverges is left out) and "restore" (and weights and
            optimizer state go back to the last good snapshot); both warn, and raise after ten such steps in a
            row.
        detectors: Detectors of divergence; None: :func:`stability.divergence.default_detectors`.
        layer_jacobian_every: Norms of ∂output/∂input of each attention layer at each n-th step; 0: never.
            It costs about 25 forward passes of the layer.
        flight_recorder: Steps kept in ``log_dir``/flight_recorder.bin, a memory-mapped file that outlives the
            process, at 36 + 12 v bytes a step and v = 256 + 16 × the number of layers. An alert, an exception
            or Ctrl-C then also writes a folder into ``log_dir``/incidents. 0: neither.
        same_step: Whether verdicts come before the optimizer steps, at one synchronisation of the device at
            every recorded step. It takes exactly one optimizer.
        snapshot_every: Steps between the snapshots of ``on_divergence="restore"``, of which two are kept:
            with AdamW six times the size of the parameters, in the devices' memory.
        hparams: Names and values, such as the learning rate, by which TensorBoard's HParams page tells runs
            apart; it sorts them by their peak gradient norm.
        process_group: The processes that train the model together (DDP, FSDP2, tensor parallelism), all of
            which call ``attach`` with the same arguments; None: all there are. Their numbers are joined at
            each recorded step to those of the whole model and batch, and the first one writes:
            docs/distributed.md.

    Returns:
        The attached probe. Close it, or use it as a context manager.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the model has no parameters, is compiled or is watched already, a pattern of
            ``layers`` matches nothing, ``log_dir`` is empty, another probe writes to a sink's file, a number
            is out of range, ``on_divergence`` is unknown, a detector reads a quantity that is never recorded,
            ``same_step`` is missing for it or has not exactly one optimizer, or the processes differ in what
            must be the same.
        OSError: If ``log_dir`` cannot be written.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with attach(model, optimizer) as probe:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> [record.value for record in probe.records if record.quantity == "grad_max_abs"]
        [1.0]
    """
    optimizers = _optimizers(optimizer)
    _check_model(model)
    wrapper, model = model, unwrapped(model)
    for name, number in (
        ("every", every),
        ("activations_every", activations_every),
        ("details_every", details_every),
        ("layer_jacobian_every", layer_jacobian_every),
        ("flight_recorder", flight_recorder),
    ):
        check_count(name, number, minimum=0)
    check_count("snapshot_every", snapshot_every, minimum=1)
    if attention_every is not None:
        check_count("attention_every", attention_every, minimum=0)
    if attention_rows is not None:
        check_count("attention_rows", attention_rows, minimum=1)
    check_flag("same_step", same_step)
    if log_dir is not None:
        check_log_dir(log_dir)
    _check_optimizers(optimizers, model)
    check_members("sinks", sinks, Sink, "probes.sinks.JsonLinesSink(path)")
    check_sinks_are_free(sinks)
    given = sinks  # remembered alike by all processes, of which one writes
    if detectors is not None:
        check_members("detectors", detectors, Detector, "stability.divergence.NonFiniteDetector()")
        check_quantities(detectors)
    if hparams is not None:
        check_hparams(hparams)
    schedule = Schedule(
        gradients=every,
        activations=activations_every,
        details=details_every,
        attention=DEFAULT_ATTENTION_EVERY if attention_every is None else attention_every,
        layer_jacobians=layer_jacobian_every,
    )
    names = layer_names(model)
    selected = select_layers(names.values(), layers)
    if same_step and len(optimizers) != 1:
        raise ValueError(
            f"`same_step` judges one optimizer's updates; got {len(optimizers)} optimizers. Leave it out, "
            "or give `optimizer` one."
        )
    detectors = default_detectors() if detectors is None else detectors
    settings = {
        "layers": sorted(selected),
        "attention_rows": attention_rows,
        "on_divergence": "a function" if callable(on_divergence) else on_divergence,
        "detectors": [told_of(detector) for detector in detectors],
        "same_step": same_step,
        "snapshot_every": snapshot_every,
    }
    ranks, sharding = join_ranks(wrapper, names, process_group, schedule, settings)
    is_writer = ranks is None or ranks.is_first
    action = AlertAction(on_divergence, same_step=same_step, warns=is_writer)
    incidents = earlier = None
    if not is_writer:
        log_dir, sinks = None, ()
    if log_dir is not None:  # after every check: a refused call leaves no directory behind
        log_dir = Path(log_dir).absolute()  # the script may go to another directory
        configuration = _configuration(model, optimizers, schedule)
        tensorboard = TensorBoardSink(
            log_dir, layers=tuple(names.values()), configuration=configuration, hparams=hparams
        )
        if tensorboard.last_earlier_step is not None:
            earlier = EarlierSession(log_dir, tensorboard.last_earlier_step)
        sinks = (tensorboard, *sinks)
        recorder = _flight_recorder(log_dir, flight_recorder, len(selected))
        if recorder is not None:
            sinks = (recorder, *sinks)
            incidents = IncidentWriter(log_dir / "incidents", recorder.path)
    delivery = Delivery(sinks, detectors, action, names.values(), incidents, ranks)
    probe = Probe(
        names,
        optimizers,
        delivery,
        selected=selected,
        schedule=schedule,
        attention_rows=attention_rows,
        sharding=sharding,
        has_ranks=ranks is not None,
        is_attention_required=bool(attention_every),
        same_step=same_step,
        snapshots=(
            Snapshots(model, optimizers[0], snapshot_every, delivery.detection) if action.restores else None
        ),
        earlier=earlier,
    )
    probe.on_close(take_sinks(given))
    _open_probes[model] = probe
    probe.on_close(lambda: _open_probes.pop(model, None))
    return probe


def _leave_files_to_parent() -> None:
    """In a forked process: what it trains, and its end, would be written among what its parent records."""
    for probe in _open_probes.values():
        probe._keep_in_memory()
    _open_probes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_files_to_parent)


@atexit.register
def _close_open_probes() -> None:
    """Brings the records of a script that never closed its probe to disk."""
    # At exit, what ended the script is no longer under way; in a session, an old error would be there.
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    for probe in list(_open_probes.values()):
        probe._close(silently=True, error=error)


def _flight_recorder(log_dir: Path, steps: int, num_layers: int) -> FlightRecorder | None:
    """The recorder; None, with a warning, where another probe records or the disk cannot hold it."""
    if not steps:
        set_aside(log_dir / FILE_NAME)  # an earlier session's would be read as this one's
        return None
    try:
        return FlightRecorder(log_dir / FILE_NAME, steps=steps, values_per_step=256 + 16 * num_layers)
    except OSError as error:
        if not isinstance(error, BlockingIOError):  # as above
            set_aside(log_dir / FILE_NAME)
        warnings.warn(f"no flight recorder and no incident folders: {error}", ProbeWarning, stacklevel=3)
        return None


def _configuration(
    model: nn.Module, optimizers: Sequence[Optimizer], schedule: Schedule
) -> dict[str, object]:
    """What TensorBoard's Text page tells of the run."""
    # Lazy layers do not know their size yet.
    size = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    rows: dict[str, object] = {"model": type(model).__name__, "parameters": f"{size:,}"}
    for optimizer in optimizers:
        # No tensor among them: to print one on a device is to wait for it.
        defaults = optimizer.defaults.items()
        told = (f"{key}={value}" for key, value in defaults if isinstance(value, bool | int | float | tuple))
        rows[f"optimizer {type(optimizer).__name__}"] = ", ".join(told)
    rows["recorded every n-th step"] = ", ".join(f"{key} {n}" for key, n in asdict(schedule).items())
    return rows | environment()


def _optimizers(optimizer: object) -> list[Optimizer]:
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(optimizers, list | tuple) or not all(isinstance(o, Optimizer) for o in optimizers):
        raise TypeError(
            "`optimizer` must be a torch.optim.Optimizer, a list of them, or None; "
            f"got {type(optimizer).__name__}."
        )
    return list(optimizers)


def _check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    if len(set(optimizers)) != len(optimizers):
        raise ValueError("`optimizer` names one optimizer twice; name each once.")
    parameters = set(model.parameters())
    for optimizer in optimizers:
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # Accelerate's wrapper, which has no hooks
            raise ValueError(
                f"`optimizer` must be the one that updates the weights; this {type(optimizer).__name__} "
                "wraps it. Give that one: optimizer.optimizer."
            )
        if not any(
            parameter in parameters for group in optimizer.param_groups for parameter in group["params"]
        ):
            raise ValueError(
                f"`optimizer` must hold parameters of `model`; this {type(optimizer).__name__} holds none of "
                f"{type(model).__name__}'s."
            )


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    for name, module in model.named_modules():
        if is_compiled(module):
            where = f"`{name}` in `model`" if name else "`model`"
            raise ValueError(
                f"{where} is compiled already; attach to the model first and compile it then: "
                "probe = probes.attach(model, ...), compiled = torch.compile(model)."
            )
    if next(model.parameters(), None) is None:
        raise ValueError(f"`model` must have parameters to watch; {type(model).__name__} has none.")
    if unwrapped(model) in _open_probes:
        raise ValueError("`model` is watched already; close its probe first: probe.close().")
