"""The processes that train one model together: who they are, and what they agree on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from probes.collective import GlobalTransfer, Lane, LocalTransfer
from probes.layout import Layout, agree
from probes.pending import Pending
from probes.record import Series
from probes.schedule import Schedule, is_due
from probes.sharding import Sharding, tensor_parallel_ranks, tensor_shards
from stability.divergence import ALL_LAYERS, Alert

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")


class _Agreed(NamedTuple):
    """What must be the same on every rank, and the ranks that see the same samples as one."""

    settings: dict[str, object]
    tensor_ranks: list[int]


class Ranks:
    """The ranks of a process group, seen from one of them.

    All ranks take part in one collective at each step for which the schedule has something, whatever they
    have measured, and read the same numbers from it. So they come to the same verdicts and act on them at the
    same step.

    Args:
        group: The ranks.
        device: Where they gather.
        schedule: When something is measured.
        wrapper: What the script trains, a ``DistributedDataParallel`` maybe.

    Attributes:
        rank: This process, as ``torch.distributed.get_rank`` gives it.
        is_first: Whether it is the one that writes.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, schedule: Schedule, wrapper: nn.Module
    ) -> None:
        self.rank = dist.get_rank()
        self.is_first = group.rank() == 0
        self._schedule = astuple(schedule)
        self._group = group
        self._device = device
        self._lane = Lane(group, device)
        self._ranks = dist.get_process_group_ranks(group)
        self._wrapper = wrapper
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._num_transfers = 0

    def is_due(self, step: int) -> bool:
        """Whether the ranks' numbers of a step are joined."""
        return any(is_due(step, every) for every in self._schedule)

    def start(self, step: int, pending: Pending, *, is_rest: bool) -> GlobalTransfer:
        """Sends a step's numbers to every rank. All ranks call it, in the same order.

        Args:
            step: A step that is due.
            pending: What this rank has measured.
            is_rest: Whether the step has sent numbers before.

        Raises:
            RuntimeError: Under ``with model.join()``, where some ranks have no more steps while others go on.
        """
        join_config = getattr(self._wrapper, "_join_config", None)
        if join_config is not None and join_config.enable:
            raise RuntimeError(
                "probes join the ranks' numbers at each recorded step, which a rank without batches "
                "under `with model.join()` does not reach. Give every rank equally many batches "
                "(DistributedSampler does), or train without the probe."
            )
        kind = (is_rest, *(is_due(step, every) for every in self._schedule))
        layout = self._layouts.get(kind)
        if layout is None or layout.expires <= self._num_transfers:
            with _current(self._device):
                layout = self._layouts[kind] = agree(pending, self._device, self._group)
        transfer = GlobalTransfer(step, self._num_transfers, pending, layout, self._lane)
        self._num_transfers += 1
        return transfer

    def check_same(self, name: str, value: object) -> None:
        """Raises on every rank if they differ in something. All ranks call it, and wait for each other.

        Raises:
            ValueError: If they do.
        """
        with _current(self._device):
            _check_same(_of_everyone({name: value}, self._group), self._ranks)

    def start_alone(self, step: int, pending: Pending | None) -> LocalTransfer | None:
        """The copy of numbers that only this rank has; None where nobody writes them."""
        return LocalTransfer(step, pending, self.rank) if pending and self.is_first else None

    def blame(self, alert: Alert, first_broken: Mapping[Series, int]) -> Alert:
        """The alert with the rank where a value was not finite first, if numbers of ranks tell it."""
        if alert.kind != "non-finite":
            return alert
        # Parameters' gradients were summed over the ranks before they were seen; these are each rank's own.
        own = {
            (series.layer, series.quantity): self._ranks[index]
            for series, index in first_broken.items()
            if series.quantity.startswith(("activation", "attention/"))
            or series.layer == ALL_LAYERS  # the loss, and the gradient that a RankWitness sees
        }
        if not own:
            return alert
        rank = own.get((alert.layer, alert.quantity), min(own.values()))
        return replace(alert, reason=f"{alert.reason.removesuffix('.')} (first on rank {rank}).", rank=rank)


def join_ranks(
    wrapper: nn.Module,
    names: dict[nn.Module, str],
    process_group: dist.ProcessGroup | None,
    schedule: Schedule,
    settings: Mapping[str, object],
) -> tuple[Ranks | None, Sharding]:
    """Finds out who trains the model together; every rank calls it.

    Args:
        wrapper: The model, as the script trains it.
        names: Name of every module of what is :func:`unwrapped` of it.
        process_group: The ranks; None: all there are.
        schedule: When something is measured.
        settings: What has to be the same on every rank, beside model and schedule.

    Returns:
        The ranks, None if this one trains alone; and which part of everything it holds.

    Raises:
        ValueError: If ranks differ in what must be the same, or split the model in a way that is not covered.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "`process_group` was given, but torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first, or leave it out."
            )
        return None, Sharding()
    model = unwrapped(wrapper)
    group = process_group or dist.group.WORLD
    assert group is not None  # initialized
    if dist.get_rank(group) < 0:  # new_group gives those outside a number
        raise ValueError("`process_group` must contain this process; give each process a group of its own.")
    _check_replicas(wrapper, dist.get_process_group_ranks(group))
    _check_sharding(model, group.size(), bool(schedule.layer_jacobians))
    rank = dist.get_rank()
    tensor_ranks = tensor_parallel_ranks(model, rank)
    if group.size() == 1:
        return None, Sharding(tensor_ranks=tensor_ranks, rank=rank, has_dtensors=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mine = _Agreed({**settings, "schedule": schedule, "parameters": shapes}, tensor_ranks)
    device = gathering_device(str(dist.get_backend_config(group)), model)
    with _current(device):
        everyone = _of_everyone(mine, group)
    _check_same([agreed.settings for agreed in everyone], dist.get_process_group_ranks(group))
    data_groups = sorted({tuple(agreed.tensor_ranks) for agreed in everyone})
    if len(data_groups) * len(tensor_ranks) != group.size():
        raise ValueError(
            f"`process_group` must hold whole tensor-parallel groups; its {group.size()} ranks are divided "
            f"into {data_groups}."
        )
    shards = tensor_shards(model) if len(tensor_ranks) > 1 else {}
    sharding = Sharding(
        num_ranks=group.size(),
        tensor_ranks=tensor_ranks,
        rank=rank,
        data_rank=data_groups.index(tuple(tensor_ranks)),
        split_layers=[n for m, n in names.items() if any(p in shards for p in m.parameters())],
        # A weight that is split along its inputs takes a part of each (RowwiseParallel).
        split_inputs=[
            n for m, n in names.items() for p in m.parameters(recurse=False) if max(shards.get(p, [0]))
        ],
        has_dtensors=True,
    )
    return Ranks(group, device, schedule, wrapper), sharding


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in a ``DistributedDataParallel``, whose layers keep their names; anything else as it is."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def told_of(detector: object) -> str:
    """A detector's class and the numbers it holds, those within it too, to compare between ranks."""
    told = []
    for name, value in getattr(detector, "__dict__", {}).items():
        if isinstance(value, bool | int | float | str):
            told.append(f"{name.removeprefix('_')}={value!r}")
        elif isinstance(value, tuple | list):
            told += [told_of(member) for member in value if hasattr(member, "state_dict")]
    return f"{type(detector).__name__}({', '.join(told)})"


def gathering_device(backends: str, model: nn.Module) -> torch.device:
    """Where ranks gather: with NCCL on the model's GPU, current or not; with gloo on the CPU.

    Args:
        backends: The process group's, such as "cpu:gloo,cuda:nccl".
        model: The model.

    Raises:
        ValueError: If they are neither.
    """
    if "nccl" in backends:
        on_gpu = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
        if on_gpu is not None:
            return on_gpu
        if "gloo" not in backends:  # parameters wait on the CPU until they are used
            return torch.device("cuda", torch.cuda.current_device())
    if "gloo" in backends:
        return torch.device("cpu")
    raise ValueError(f"the process group must use nccl or gloo; it uses {backends}.")


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, on which NCCL exchanges objects."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _of_everyone(mine: T, group: dist.ProcessGroup) -> list[T]:
    everyone = [mine] * group.size()
    dist.all_gather_object(everyone, mine, group)
    return everyone


def _check_same(everyone: Sequence[Mapping[str, object]], ranks: list[int]) -> None:
    first = everyone[0]
    for rank, settings in zip(ranks, everyone, strict=True):
        for name, value in settings.items():
            if first[name] == value:
                continue
            if name == "parameters":
                raise ValueError(
                    f"ranks {ranks[0]} and {rank} hold different models. Stages of a pipeline are not "
                    "covered together: give `process_group` the ranks that hold the same stage."
                )
            raise ValueError(
                f"`{name}` must be the same on every rank; rank {ranks[0]} has {first[name]!r} and rank "
                f"{rank} {value!r}."
            )


def _check_replicas(wrapper: nn.Module, ranks: list[int]) -> None:
    # torch turns DTensors into ordinary parameters for DDP, and back during each forward pass.
    if any(hasattr(parameter, "_st_info") for parameter in wrapper.parameters()):
        raise ValueError(
            "`model` is tensor parallel within DistributedDataParallel, which hides what is split. Use "
            "fully_shard over the data-parallel ranks in its place."
        )
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        replicas = dist.get_process_group_ranks(wrapper.process_group)
        if replicas != ranks:
            raise ValueError(
                f"`model` is trained by ranks {replicas} (DistributedDataParallel) and `process_group` holds "
                f"{ranks}; numbers of different models would be joined. Give "
                "process_group=model.process_group."
            )


def _check_sharding(model: nn.Module, num_ranks: int, has_jacobians: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "`model` uses FullyShardedDataParallel (FSDP1), whose flat parameters belong to no layer; use "
            "torch.distributed.fsdp.fully_shard, its successor."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            if num_ranks % parameter.device_mesh.size():
                raise ValueError(
                    f"`process_group` must hold every rank of the mesh of {name}: it has {num_ranks} ranks, "
                    f"the mesh {parameter.device_mesh.size()}."
                )
            if has_jacobians:
                raise ValueError(
                    "`layer_jacobian_every` runs a layer again, which needs its whole parameters; those of "
                    f"`model` are sharded ({name}). Leave it out."
                )
