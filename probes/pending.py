"""The scalars of one step: gathered on the device, moved in one asynchronous copy, joined on the host."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.quantities import reduction_of, root_sum_of_squares
from probes.record import ALL_LAYERS, Kind, Series, StepRecords

GLOBAL_GRAD_NORM = Series(ALL_LAYERS, "grad_norm")


class Measurement(NamedTuple):
    """One tensor on its way to the host: 0-d for a layer, [heads] when ``per_head``; times ``factor``."""

    series: Series
    tensor: Tensor
    factor: float
    per_head: bool
    is_standard_error: bool


class Ratio(NamedTuple):
    """A quantity that is formed on the host from two others once each of them is joined."""

    result: Series
    numerator: Series
    denominator: Series


class Pending:
    """Collects the measurements of the step under way. Nothing here waits for the device."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.numbers: list[tuple[Series, float]] = []
        self.ratios: list[Ratio] = []

    def __bool__(self) -> bool:
        return bool(self.measurements or self.numbers)

    def take(self) -> Pending:
        """Hands over what was collected and starts afresh."""
        taken = Pending()
        taken.measurements, self.measurements = self.measurements, taken.measurements
        taken.numbers, self.numbers = self.numbers, taken.numbers
        taken.ratios, self.ratios = self.ratios, taken.ratios
        return taken

    def add(
        self,
        series: Series,
        value: Tensor,
        standard_error: Tensor | None = None,
        *,
        factor: float = 1.0,
        per_head: bool = False,
    ) -> None:
        """Adds one measurement; several of one series are joined by their quantity's reduction.

        A series whose quantity begins with an underscore serves ratios only and is not recorded. The factor
        is applied on the host, where it launches no kernel.
        """
        self.measurements.append(Measurement(series, value, factor, per_head, False))
        if standard_error is not None:
            self.measurements.append(Measurement(series, standard_error, factor, per_head, True))

    def add_number(self, series: Series, value: float) -> None:
        """Adds a number that is on the host already."""
        self.numbers.append((series, value))

    def add_ratio(self, result: Series, numerator: Series, denominator: Series) -> None:
        """Adds a ratio of two other series of this step."""
        self.ratios.append(Ratio(result, numerator, denominator))


class Transfer:
    """A step's scalars on their way to the host: one asynchronous copy per device that holds any."""

    def __init__(self, step: int, pending: Pending) -> None:
        self.step = step
        self._pending = pending
        # Packed dtype by dtype: converting scalar by scalar would launch one kernel for each.
        by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, measurement in enumerate(pending.measurements):
            tensor = measurement.tensor
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
        by_device: dict[torch.device, list[list[int]]] = {}
        for (device, _), group in by_kind.items():
            by_device.setdefault(device, []).append(group)
        self._copies = []
        for device, groups in by_device.items():
            tensors = [[pending.measurements[index].tensor for index in group] for group in groups]
            order = [index for group in groups for index in group]
            self._copies.append((order, *_copy_to_host(device, tensors)))

    def wait(self) -> StepRecords:
        """The step's records. Waits for the copy if it has not arrived; one step later it has."""
        values: dict[Series, list[float]] = {}
        errors: dict[Series, list[float]] = {}
        kinds: dict[Series, Kind] = {}
        for measurement, numbers in zip(self._pending.measurements, self._numbers(), strict=True):
            series, _, factor, per_head, is_standard_error = measurement
            if series.kind != "exact":
                # Parts of different kinds (all rows of a short batch, a sample of a long one) are one series.
                kind, series = series.kind, _exact(series)
                for name in (series, *(_of_head(series, head) for head in range(per_head * len(numbers)))):
                    kinds[name] = kind
            target = errors if is_standard_error else values
            if per_head:
                for head, number in enumerate(numbers):
                    target.setdefault(_of_head(series, head), []).append(number * factor)
            else:
                target.setdefault(series, []).append(numbers[0] * factor)
        for series, number in self._pending.numbers:
            values.setdefault(series, []).append(number)
        joined = {
            series: parts[0] if len(parts) == 1 else reduction_of(series.quantity)(parts)
            for series, parts in values.items()
        }
        for result, numerator, denominator in self._pending.ratios:
            # A gradient of zero on both sides has no ratio.
            if joined.get(denominator) and numerator in joined:
                joined[result] = joined[numerator] / joined[denominator]
        grad_norms = [value for s, value in joined.items() if s.quantity in ("grad_norm", "_other_grad_norm")]
        if grad_norms:
            joined[GLOBAL_GRAD_NORM] = root_sum_of_squares(grad_norms)
        recorded = {s: value for s, value in joined.items() if s.quantity[0] != "_"}
        # A mean of k parts has the standard error sqrt(Σ e²)/k.
        error_of = {s: root_sum_of_squares(parts) / len(parts) for s, parts in errors.items()}
        return StepRecords(
            self.step,
            tuple(s._replace(kind=kinds[s]) if s in kinds else s for s in recorded),
            np.array(list(recorded.values()), dtype=np.float64),
            np.array([error_of.get(series, math.nan) for series in recorded], dtype=np.float64),
        )

    def _numbers(self) -> list[list[float]]:
        """The numbers of every measurement, in the order in which they were measured."""
        numbers: list[list[float]] = [[]] * len(self._pending.measurements)
        for order, host, arrived in self._copies:
            if arrived is not None:
                arrived.synchronize()
            everything, start = host.tolist(), 0
            for index in order:
                end = start + self._pending.measurements[index].tensor.numel()
                numbers[index] = everything[start:end]
                start = end
        return numbers


# Names are made at every step anew; a model has some thousands of them.
@lru_cache(maxsize=2**16)
def _exact(series: Series) -> Series:
    return series._replace(kind="exact")


@lru_cache(maxsize=2**16)
def _of_head(series: Series, head: int) -> Series:
    return series._replace(head=head)


def _copy_to_host(device: torch.device, groups: list[list[Tensor]]) -> tuple[Tensor, torch.cuda.Event | None]:
    """The step's one copy from a device to the host, and the event that marks its arrival."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    packed = torch.cat([torch.cat([t.detach().view(-1) for t in group]).to(wide) for group in groups])
    if device.type != "cuda":
        return packed.to("cpu"), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return host, arrived
