"""Norms of finite tensors that neither overflow nor underflow, without a device synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import compress

import torch
from torch import Tensor

# Under this norm a float32 sum of squares may have lost terms (the least normal float32 is 1e-38).
_SMALLEST_SAFE_NORM = 1e-12
# A float32 sum of many squares loses digits (1e-3 at 3e7 entries), and summing in float64 is 25 times slower
# on a CPU. Longer tensors are therefore summed in parts, which are joined in float64.
_LONGEST_SUM = 2**18
_PART = 2**16


def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of every tensor, over all its entries.

    The norm of a finite tensor is finite (unless it is itself past float64's range) and, unless the tensor is
    zero, positive: entries of 1e20 or 1e-25 in float32, whose squares leave the range, are summed in float64
    (CUDA) or rescaled by the largest absolute value first (CPU). A NaN or infinity in the tensor comes out as
    NaN or infinity.

    Args:
        tensors: Floating-point tensors of any shape, strides and device; empty ones have norm 0.

    Returns:
        0-d float64 tensors (float32 where the device has no float64), each on its tensor's device, in the
        order given. Nothing is copied to the host.

    Source:
        Scaled sum of squares, as in BLAS ``nrm2`` (Blue, 1978).

    Example:
        >>> norms = tensor_norms([torch.full((4,), 1e20), torch.full((4,), 1e-25)])
        >>> [f"{norm.item():.3g}" for norm in norms]
        ['2e+20', '2e-25']
    """
    norms = [torch.empty(0)] * len(tensors)
    for indices, of_device in tensor_norms_by_device(tensors):
        for index, norm in zip(indices, of_device.unbind(), strict=True):
            norms[index] = norm
    return norms


@torch.no_grad()
def tensor_norms_by_device(tensors: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """:func:`tensor_norms`, those of a device together: all of a model's for the price of a few launches.

    Returns:
        For each device the indices of its tensors and their norms, [number of indices].

    Example:
        >>> tensor_norms_by_device([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        [([0, 1], tensor([5., 0.], dtype=torch.float64))]
    """
    return [(indices, _norms([tensors[index] for index in indices])) for indices in by_device(tensors)]


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors of each device.

    Example:
        >>> by_device([torch.empty(2), torch.empty(3)])
        [[0, 1]]
    """
    # By their numbers (the CPU's is −1), because a device takes as long to hash as all the rest.
    devices = [tensor.get_device() for tensor in tensors]
    return [[i for i, device in enumerate(devices) if device == found] for found in dict.fromkeys(devices)]


def tensor_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of one tensor, as :func:`tensor_norms`; a quarter of the overhead.

    Example:
        >>> tensor_norm(torch.tensor([3.0, 4.0])).item()
        5.0
    """
    tensor = tensor.detach() if tensor.requires_grad else tensor  # an operation, which takes time
    if tensor.is_cuda:
        return torch._foreach_norm([tensor], 2, dtype=torch.float64)[0]
    return _norm_on_cpu(tensor) if tensor.is_cpu else _rescaled_norm(tensor)


@torch.no_grad()
def largest_entries(tensors: Sequence[Tensor]) -> Tensor:
    """:func:`max_abs` of tensors on one device, [number of tensors] in their common dtype; on CUDA fused.

    Example:
        >>> largest_entries([torch.tensor([1.0, -3.0]), torch.empty(0)])
        tensor([3., 0.])
    """
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, math.inf))
    low, high = zip(*map(torch.aminmax, tensors), strict=True)  # as in max_abs
    return torch.maximum(torch.stack(low).abs_(), torch.stack(high).abs_())


@torch.no_grad()
def count_nonfinite(tensors: Sequence[Tensor], largest: Tensor) -> Tensor:
    """NaN and infinite entries of tensors on one device. On CUDA it takes temporaries of the tensors' size.

    Args:
        tensors: Floating-point tensors.
        largest: Their :func:`largest_entries`. A tensor whose largest entry is finite has finite ones only,
            and where reading it waits for nothing (CPU) it spares the count.

    Returns:
        [number of tensors], on the tensors' device: float64, or float32 on others than the CPU, where counts
        beyond 2²⁴ are rounded.

    Example:
        >>> tensors = [torch.tensor([1.0, math.nan]), torch.ones(3)]
        >>> count_nonfinite(tensors, largest_entries(tensors)).tolist()
        [1.0, 0.0]
    """
    if largest.device.type == "cpu":
        counts = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
        for index, value in enumerate(largest.tolist()):
            if not math.isfinite(value):
                counts[index] = tensors[index].isfinite().logical_not_().sum()
        return counts
    # x − x is NaN where x is not finite and 0 elsewhere.
    differences = torch._foreach_sub(list(tensors), list(tensors))
    # Not in float64: for this norm CUDA would first copy each tensor to it.
    dtype = reduce(torch.promote_types, {difference.dtype for difference in differences}, torch.float32)
    return torch.stack(torch._foreach_norm(differences, 0, dtype=dtype))


def max_abs(tensor: Tensor) -> Tensor:
    """Largest absolute value of a tensor, as a 0-d tensor of its dtype; NaN if it holds one, 0 if empty.

    Example:
        >>> max_abs(torch.tensor([1.0, -3.0, 2.0]))
        tensor(3.)
    """
    tensor = tensor.detach() if tensor.requires_grad else tensor  # an operation, which takes time
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    if not tensor.is_cpu:
        return torch.linalg.vector_norm(tensor, math.inf)
    low, high = torch.aminmax(tensor)  # ten times faster than the norm
    return torch.maximum(low.neg_(), high)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors on one device, [number of tensors]."""
    device = tensors[0].device
    if device.type == "cuda":
        # Fused launches; the GPU is bandwidth bound here, so float64 sums cost nothing.
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    if device.type != "cpu":
        return torch.stack([_rescaled_norm(tensor) for tensor in tensors])
    are_short = [tensor.dtype is torch.float32 and tensor.numel() <= _LONGEST_SUM for tensor in tensors]
    short = list(compress(tensors, are_short))
    fused = iter(torch._foreach_norm(short, 2) if short else ())
    norms = torch.stack(
        [
            next(fused) if is_short else _unscaled_norm_on_cpu(tensor)
            for tensor, is_short in zip(tensors, are_short, strict=True)
        ]
    ).double()
    # Reading a CPU scalar waits for nothing, so the second pass is made only where it is needed.
    for index, norm in enumerate(norms.tolist()):
        if not _SMALLEST_SAFE_NORM < norm < math.inf:
            norms[index] = _rescaled_norm(tensors[index])
    return norms


def _norm_on_cpu(tensor: Tensor) -> Tensor:
    norm = _unscaled_norm_on_cpu(tensor)
    return norm if _SMALLEST_SAFE_NORM < norm.item() < math.inf else _rescaled_norm(tensor)


def _unscaled_norm_on_cpu(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if tensor.numel() > _LONGEST_SUM and dtype is torch.float32:
        parts = [torch.linalg.vector_norm(part, dtype=dtype) for part in tensor.reshape(-1).split(_PART)]
        return torch.linalg.vector_norm(torch.stack(parts).double())
    return torch.linalg.vector_norm(tensor, dtype=dtype).double()


def _rescaled_norm(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    largest = max_abs(tensor).to(dtype)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(tensor.to(dtype) / scale) * scale
