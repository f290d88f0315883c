"""Norms of finite tensors that neither overflow nor underflow, without a device synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
    return in_order(tensor_norms_by_device(tensors))


@torch.no_grad()
def tensor_norms_by_device(tensors: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """:func:`tensor_norms`, those of a device together: all of a model's for the price of a few launches.

    Returns:
        For each device the indices of its tensors and their norms, [number of indices].

    Example:
        >>> tensor_norms_by_device([torch.tensor([3.0, 4.0]), torch.zeros(2)])
        [([0, 1], tensor([5., 0.], dtype=torch.float64))]
    """
    by_device: dict[int | torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        # Numbers, because a device takes as long to hash as all the rest.
        device = tensor.get_device() if tensor.is_cuda else tensor.device
        by_device.setdefault(device, []).append(index)
    return [(indices, _norms([tensors[index] for index in indices])) for indices in by_device.values()]


def in_order(by_device: Iterable[tuple[list[int], Tensor]]) -> list[Tensor]:
    """The 0-d tensors of what :func:`tensor_norms_by_device` returned, in the order of its argument.

    Example:
        >>> in_order([([0, 2], torch.tensor([5.0, 1.0])), ([1], torch.tensor([3.0]))])
        [tensor(5.), tensor(3.), tensor(1.)]
    """
    numbered = [
        pair for indices, of_device in by_device for pair in zip(indices, of_device.unbind(), strict=True)
    ]
    return [norm for _, norm in sorted(numbered, key=lambda pair: pair[0])]


def tensor_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of one tensor, as :func:`tensor_norms`; a quarter of the overhead.

    Example:
        >>> tensor_norm(torch.tensor([3.0, 4.0])).item()
        5.0
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return _norm_on_cpu(tensor)
    if tensor.device.type == "cuda":
        return torch._foreach_norm([tensor], 2, dtype=torch.float64)[0]
    return _rescaled_norm(tensor)


def largest_entries(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`max_abs` of every tensor, on CUDA by few launches.

    Example:
        >>> largest_entries([torch.tensor([1.0, -3.0]), torch.empty(0)])
        [tensor(3.), tensor(0.)]
    """
    largest = [torch.empty(0)] * len(tensors)
    fused = [i for i, tensor in enumerate(tensors) if tensor.device.type == "cuda" and tensor.numel()]
    if fused:
        found = torch._foreach_norm([tensors[i].detach() for i in fused], math.inf)
        for i, value in zip(fused, found, strict=True):
            largest[i] = value
    for i in set(range(len(tensors))).difference(fused):
        largest[i] = max_abs(tensors[i])
    return largest


def count_nonfinite(tensors: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """NaN and infinite entries of every tensor. On CUDA it takes temporaries of the tensors' size.

    Args:
        tensors: Floating-point tensors.
        norms: Their :func:`tensor_norms`. A finite norm has finite parts only, and where reading it waits for
            nothing (CPU) it spares the count.

    Returns:
        0-d float64 or float32 tensors on the tensors' devices; rounded beyond 2²⁴ entries on CUDA.

    Example:
        >>> tensors = [torch.tensor([1.0, math.nan]), torch.ones(3)]
        >>> [int(count) for count in count_nonfinite(tensors, tensor_norms(tensors))]
        [1, 0]
    """
    counts = [torch.zeros((), dtype=torch.float64)] * len(tensors)
    counted = [
        i for i, norm in enumerate(norms) if norm.device.type != "cpu" or not math.isfinite(norm.item())
    ]
    if counted:
        chosen = [tensors[i].detach() for i in counted]
        # x − x is NaN where x is not finite and 0 elsewhere.
        for i, difference in zip(counted, torch._foreach_sub(chosen, chosen), strict=True):
            dtype = torch.promote_types(difference.dtype, torch.float32)
            counts[i] = torch.linalg.vector_norm(difference, 0, dtype=dtype)
    return counts


def max_abs(tensor: Tensor) -> Tensor:
    """Largest absolute value of a tensor, as a 0-d tensor of its dtype; NaN if it holds one, 0 if empty.

    Example:
        >>> max_abs(torch.tensor([1.0, -3.0, 2.0]))
        tensor(3.)
    """
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, float("inf"))
    low, high = torch.aminmax(tensor)  # ten times faster than the norm
    return torch.maximum(-low, high)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors on one device, [number of tensors]."""
    device = tensors[0].device
    if device.type == "cuda":
        # Fused launches; the GPU is bandwidth bound here, so float64 sums cost nothing.
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    if device.type != "cpu":
        return torch.stack([_rescaled_norm(tensor) for tensor in tensors])
    norms = torch.empty(len(tensors), dtype=torch.float64)
    short = [
        index
        for index, tensor in enumerate(tensors)
        if tensor.dtype is torch.float32 and tensor.numel() <= _LONGEST_SUM
    ]
    if short:
        norms[short] = torch.stack(torch._foreach_norm([tensors[index] for index in short], 2)).double()
    for index in set(range(len(tensors))).difference(short):
        norms[index] = _unscaled_norm_on_cpu(tensors[index])
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
