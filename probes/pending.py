"""The scalars of one step: gathered on the device, moved in one asynchronous copy, joined on the host."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.quantities import reduction_of, root_sum_of_squares
from probes.record import ALL_LAYERS, Series, StepRecords

GLOBAL_GRAD_NORM = Series(ALL_LAYERS, "grad_norm")


class Measurement(NamedTuple):
    """One tensor on its way to the host: 0-d for a layer, [heads] when ``per_head``."""

    series: Series
    tensor: Tensor
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
        taken.__dict__, self.__dict__ = self.__dict__, taken.__dict__
        return taken

    def add(
        self, series: Series, value: Tensor, standard_error: Tensor | None = None, *, per_head: bool = False
    ) -> None:
        """Adds one measurement; several of one series are joined by their quantity's reduction.

        A series whose quantity begins with an underscore serves ratios only and is not recorded.
        """
        self.measurements.append(Measurement(series, value, per_head, is_standard_error=False))
        if standard_error is not None:
            self.measurements.append(Measurement(series, standard_error, per_head, is_standard_error=True))

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
        by_device: dict[torch.device, dict[torch.dtype, list[Measurement]]] = {}
        for measurement in pending.measurements:
            tensor = measurement.tensor
            by_device.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(measurement)
        self._copies = [
            (
                [m for group in by_dtype.values() for m in group],
                *_copy_to_host(device, list(by_dtype.values())),
            )
            for device, by_dtype in by_device.items()
        ]

    def wait(self) -> StepRecords:
        """The step's records. Waits for the copy if it has not arrived; one step later it has."""
        values, errors = self._unpack()
        for series, number in self._pending.numbers:
            values[series].append(number)
        joined = {
            series: parts[0] if len(parts) == 1 else reduction_of(series.quantity)(parts)
            for series, parts in values.items()
        }
        for result, numerator, denominator in self._pending.ratios:
            if numerator in joined and denominator in joined:
                joined[result] = _divide(joined[numerator], joined[denominator])
        grad_norms = [value for series, value in joined.items() if series.quantity == "grad_norm"]
        if grad_norms:
            joined[GLOBAL_GRAD_NORM] = root_sum_of_squares(grad_norms)
        recorded = {s: value for s, value in joined.items() if not s.quantity.startswith("_")}
        # A mean of k parts has the standard error sqrt(Σ e²)/k.
        error_of = {s: root_sum_of_squares(parts) / len(parts) for s, parts in errors.items()}
        return StepRecords(
            self.step,
            tuple(recorded),
            np.array(list(recorded.values()), dtype=np.float64),
            np.array([error_of.get(series, math.nan) for series in recorded], dtype=np.float64),
        )

    def _unpack(self) -> tuple[defaultdict[Series, list[float]], defaultdict[Series, list[float]]]:
        values: defaultdict[Series, list[float]] = defaultdict(list)
        errors: defaultdict[Series, list[float]] = defaultdict(list)
        for measurements, host, arrived in self._copies:
            if arrived is not None:
                arrived.synchronize()
            numbers = iter(host.tolist())
            for series, tensor, per_head, is_standard_error in measurements:
                target = errors if is_standard_error else values
                if per_head:
                    for head in range(tensor.numel()):
                        target[series._replace(head=head)].append(next(numbers))
                else:
                    target[series].append(next(numbers))
        return values, errors


def _copy_to_host(
    device: torch.device, groups: list[list[Measurement]]
) -> tuple[Tensor, torch.cuda.Event | None]:
    """The step's one copy from a device to the host, and the event that marks its arrival."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    packed = torch.cat(
        [torch.cat([m.tensor.detach().reshape(-1) for m in group]).to(wide) for group in groups]
    )
    if device.type != "cuda":
        return packed.to("cpu"), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return host, arrived


def _divide(numerator: float, denominator: float) -> float:
    if denominator == 0:
        return math.inf if numerator > 0 else math.nan
    return numerator / denominator
