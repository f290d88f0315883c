"""A step's scalars on their way to the host: packed, and moved in one asynchronous copy."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.joining import join
from probes.pending import Pending
from probes.record import StepRecords


class Transfer:
    """One asynchronous copy per device that holds any of a step's scalars.

    Args:
        step: The step.
        pending: Its scalars.
    """

    def __init__(self, step: int, pending: Pending) -> None:
        self.step = step
        self._pending = pending
        # Packed dtype by dtype: converting scalar by scalar would launch one kernel for each. Numbers of
        # devices, because a device takes long to hash.
        by_kind: dict[tuple[int, torch.dtype, int], list[int]] = {}
        for index, measurement in enumerate(pending.measurements):
            tensor = measurement.tensor
            by_kind.setdefault((tensor.get_device(), tensor.dtype, tensor.dim()), []).append(index)
        by_device: dict[int, list[list[int]]] = {}
        for (device, _, _), group in by_kind.items():
            by_device.setdefault(device, []).append(group)
        self._copies = []
        for groups in by_device.values():
            tensors = [[pending.measurements[index].tensor for index in group] for group in groups]
            order = [index for group in groups for index in group]
            self._copies.append((order, *_copy_to_host(tensors)))

    @property
    def has_device(self) -> bool:
        """Whether a device writes to memory of this process."""
        return any(arrived is not None for _, _, arrived in self._copies)

    def wait(self) -> StepRecords:
        """The step's records. Waits for the copy if it has not arrived; one step later it has."""
        parts = (
            (names, numbers, factor, is_standard_error)
            for (names, _, factor, is_standard_error, _), numbers in zip(
                self._pending.measurements, self._numbers(), strict=True
            )
        )
        numbers = [(series, value) for series, value, _ in self._pending.numbers]
        return join(self.step, parts, numbers, self._pending.ratios)

    def _numbers(self) -> list[list[float]]:
        """The numbers of every measurement, in the order in which they were measured."""
        numbers: list[list[float]] = [[]] * len(self._pending.measurements)
        for order, host, arrived in self._copies:
            if arrived is not None:
                arrived.synchronize()
            everything, start = host.tolist(), 0
            for index in order:
                end = start + len(self._pending.measurements[index].series)
                numbers[index] = everything[start:end]
                start = end
        return numbers


@torch.no_grad()
def _copy_to_host(groups: list[list[Tensor]]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The step's one copy from a device to the host, and the event that marks its arrival.

    Args:
        groups: Tensors of one dtype and number of dimensions, none or one.
    """
    device = groups[0][0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    joined = [torch.cat(group) if group[0].dim() else torch.stack(group) for group in groups]
    packed = torch.cat([flat.to(wide) for flat in joined])
    if device.type != "cuda":
        return packed.to("cpu"), None
    host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return host, arrived
