"""Which part of a tensor this rank holds, and how many ranks hold the same part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Sharding:
    """How what a rank holds stands to the whole model; without arguments, one process that holds all of it.

    Norms of the parts join to the norm of the whole as sqrt(Σ weight · norm²), where a part that k ranks hold
    has the weight 1/k. That is one formula for DDP (every rank holds everything), FSDP2 (parts), hybrid
    sharding (parts, several times) and tensor parallelism.

    Args:
        num_ranks: Processes that train this model together.
        tensor_ranks: Of these, the ranks that see the same samples as this one, itself among them, in order.
        rank: Which of the processes this is.
        data_rank: Which of the groups that see the same samples it belongs to.
        split_layers: Layers with parameters that are split between ``tensor_ranks``.
        split_inputs: Layers of which those ranks have a part of the input each.
        has_dtensors: Whether there may be any, so that torch's class for them has been imported.

    Attributes:
        split_inputs: As given.
        copy_weight: Weight of what every rank holds.
        gradient_weight: Weight of the gradient at an activation. A loss is averaged over the groups, so every
            gradient counts one over their number; within a group all ranks are taken to hold copies.
    """

    def __init__(
        self,
        *,
        num_ranks: int = 1,
        tensor_ranks: Sequence[int] = (0,),
        rank: int = 0,
        data_rank: int = 0,
        split_layers: Iterable[str] = (),
        split_inputs: Iterable[str] = (),
        has_dtensors: bool = False,
    ) -> None:
        self._num_ranks = num_ranks
        self._tensor_rank = tensor_ranks.index(rank)
        self._data_rank = data_rank
        self._split_layers = frozenset(split_layers)
        self.split_inputs = frozenset(split_inputs)
        self._dtensor = _dtensor_class() if has_dtensors else None
        self._num_tensor_ranks = len(tensor_ranks)
        self._num_groups = num_ranks // len(tensor_ranks)
        self.copy_weight = 1 / num_ranks
        self.gradient_weight = 1 / (self._num_groups**2 * self._num_tensor_ranks)

    def parts_and_weights(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
        """This rank's part of parameters, gradients or states, and one over the number of ranks that hold it.

        Partial sums (gradients of a normalisation under sequence parallelism are some) are added up first,
        which is a collective: every rank has to ask.

        Returns:
            Parts, of ordinary tensors these themselves; and weights.
        """
        dtensor = self._dtensor
        if dtensor is None or not any(isinstance(tensor, dtensor) for tensor in tensors):
            return list(tensors), [self.copy_weight] * len(tensors)
        parts, weights = [], []
        for tensor in tensors:  # hundreds at every step: no call more than it takes
            if isinstance(tensor, dtensor):
                spread = _spread(tensor.device_mesh, tensor.placements)
                parts.append(_local(tensor, spread))
                weights.append(spread.num_parts / self._num_ranks)
            else:
                parts.append(tensor)
                weights.append(self.copy_weight)
        return parts, weights

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts alone."""
        return self.parts_and_weights(tensors)[0]

    def part(self, tensor: Tensor) -> Tensor:
        """The part of one."""
        return self.parts([tensor])[0]

    def activation(self, tensor: Tensor) -> tuple[Tensor, float]:
        """This rank's part of an activation or a gradient there, and the weight of that gradient.

        Partial sums are added up first, as in :meth:`part`.
        """
        if self._dtensor is None or not isinstance(tensor, self._dtensor):
            return tensor, self.gradient_weight
        spread = _spread(tensor.device_mesh, tensor.placements)
        return _local(tensor, spread), self.gradient_weight * spread.num_parts

    def first_sample(self, batch_size: int) -> int:
        """Index in the global batch of this rank's first sample, if all ranks have equally many."""
        return self._data_rank * batch_size

    def first_head(self, layer: str, num_heads: int) -> int:
        """Index of the first attention head that this rank computes of a layer, of so many."""
        return self._tensor_rank * num_heads if layer in self._split_layers else 0


def tensor_parallel_ranks(model: nn.Module, rank: int) -> list[int]:
    """The ranks that share this one's samples and split the layers between them; itself alone in most runs.

    Of a parameter's mesh, the dimensions that FSDP shards or copies over are about samples: the first, or the
    first two if it copies over the first (hybrid sharding). All others are tensor parallel.
    """
    ranks, is_fsdp = [rank], has_fsdp_modules(model)
    for parameter in model.parameters():
        if isinstance(parameter, _dtensor_class()):
            mesh = parameter.device_mesh
            coordinate = mesh.get_coordinate()
            if coordinate is not None:
                group = mesh.mesh[tuple(coordinate[: _num_data_dimensions(parameter, is_fsdp)])]
                ranks = max(ranks, group.flatten().tolist(), key=len)
    return ranks


def tensor_shards(model: nn.Module) -> dict[Tensor, list[int]]:
    """Of every parameter that tensor parallelism splits, the dimensions along which it does."""
    is_fsdp = has_fsdp_modules(model)
    shards = {
        parameter: [
            placement.dim
            for placement in parameter.placements[_num_data_dimensions(parameter, is_fsdp) :]
            if _is_shard(placement)
        ]
        for parameter in model.parameters()
        if isinstance(parameter, _dtensor_class())
    }
    return {parameter: dims for parameter, dims in shards.items() if dims}


def has_fsdp_modules(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to any module."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _num_data_dimensions(parameter: DTensor, is_fsdp: bool) -> int:
    if not is_fsdp:
        return 0
    return 2 if len(parameter.placements) > 1 and parameter.placements[0].is_replicate() else 1


def _dtensor_class() -> Any:
    from torch.distributed.tensor import DTensor  # slow to import, and of no use in one process

    return DTensor


class _Spread(NamedTuple):
    """How many different parts the ranks of a mesh hold, and whether those are partial sums."""

    num_parts: int
    is_partial: bool


@lru_cache(maxsize=2**10)
def _spread(mesh: Any, placements: tuple[Any, ...]) -> _Spread:
    sizes = zip(mesh.shape, placements, strict=True)
    return _Spread(
        math.prod(size for size, placement in sizes if _is_shard(placement)),
        any(placement.is_partial() for placement in placements),
    )


def _is_shard(placement: Any) -> bool:
    # is_shard() says no of the strided shards that FSDP makes of what tensor parallelism has split already.
    return not placement.is_replicate() and not placement.is_partial()


@torch.no_grad()
def _local(tensor: DTensor, spread: _Spread) -> Tensor:
    if spread.is_partial:
        from torch.distributed.tensor import Replicate

        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    return tensor.to_local()
