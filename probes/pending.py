"""The scalars of one step: gathered on the device, moved in one asynchronous copy, joined on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.quantities import reduction_of, root_sum_of_squares
from probes.record import ALL_LAYERS, Series, StepRecords

GLOBAL_GRAD_NORM = Series(ALL_LAYERS, "grad_norm")
# What a GradScaler has multiplied the loss by, and what is therefore divided by it. (Parameters' gradients
# are unscaled when they are measured.)
LOSS_FACTOR = Series(ALL_LAYERS, "_loss_factor")
_OF_THE_SCALED_LOSS = ("activation_grad_norm", "_input_grad_norm", "_output_grad_norm")


class Measurement(NamedTuple):
    """A tensor on its way to the host, one name an entry; to be multiplied by the factor there."""

    series: Sequence[Series]
    tensor: Tensor
    factor: float
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

    @property
    def size(self) -> int:
        """How much has been collected: it grows with everything that is added."""
        return len(self.measurements) + len(self.numbers) + len(self.ratios)

    def has(self, quantity: str) -> bool:
        """Whether anything of a quantity has been measured."""
        return any(m.series and m.series[0].quantity == quantity for m in self.measurements)

    def take(self) -> Pending:
        """Hands over what was collected and starts afresh."""
        taken = Pending()
        taken.measurements, self.measurements = self.measurements, taken.measurements
        taken.numbers, self.numbers = self.numbers, taken.numbers
        taken.ratios, self.ratios = self.ratios, taken.ratios
        return taken

    def add(
        self, series: Series, value: Tensor, standard_error: Tensor | None = None, *, factor: float = 1.0
    ) -> None:
        """Adds one 0-d measurement; several of one series are joined by their quantity's reduction.

        A series whose quantity begins with an underscore serves ratios only and is not recorded. The factor
        is applied on the host, where it launches no kernel.
        """
        self.measurements.append(Measurement((series,), value, factor, False))
        if standard_error is not None:
            self.measurements.append(Measurement((series,), standard_error, factor, True))

    def add_each(
        self, series: Sequence[Series], values: Tensor, standard_errors: Tensor | None = None
    ) -> None:
        """Adds a measurement for each entry of ``values`` [len(series)]."""
        self.measurements.append(Measurement(series, values, 1.0, False))
        if standard_errors is not None:
            self.measurements.append(Measurement(series, standard_errors, 1.0, True))

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
        # Most series have one part. Lists for them would be thousands of objects a step, which Python's
        # garbage collector goes through: they are made for the others only.
        joined: dict[Series, float] = {}
        parts: dict[Series, list[float]] = {}
        errors: dict[Series, list[float]] = {}
        labelled: dict[Series, Series] = {}
        for (names, _, factor, is_standard_error), numbers in zip(
            self._pending.measurements, self._numbers(), strict=True
        ):
            for series, number in zip(names, numbers, strict=True):
                name = series
                if series.kind != "exact":
                    # Parts of different kinds (all rows of a short batch, a sample of a long one) are joined.
                    name = _exact(series)
                    labelled[name] = series
                if is_standard_error:
                    errors.setdefault(name, []).append(number * factor)
                elif name not in joined:
                    joined[name] = number * factor
                else:
                    parts.setdefault(name, [joined[name]]).append(number * factor)
        for series, number in self._pending.numbers:
            if series in joined:
                parts.setdefault(series, [joined[series]]).append(number)
            else:
                joined[series] = number
        for series, numbers in parts.items():
            joined[series] = reduction_of(series.quantity)(numbers)
        if loss_factor := joined.get(LOSS_FACTOR):
            for series in joined:
                if series.quantity in _OF_THE_SCALED_LOSS:
                    joined[series] /= loss_factor
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
            tuple(labelled.get(series, series) for series in recorded),
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
                end = start + len(self._pending.measurements[index].series)
                numbers[index] = everything[start:end]
                start = end
        return numbers


@lru_cache(maxsize=2**16)
def _exact(series: Series) -> Series:
    return series._replace(kind="exact")


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
