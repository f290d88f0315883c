"""How one rank's measurements get into the order that the ranks have agreed on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from probes.guard import is_lost
from probes.layout import FLAG, Layout, entries_of, slot_of
from probes.pending import Measurement, Pending
from probes.rank_reduction import Counting


class Packing:
    """Puts one rank's measurements into a layout, as long as it measures the same at this kind of step.

    Several measurements of one series (parameters of a layer, accumulated backward passes) are joined first,
    so that another number of them needs no other layout.

    Args:
        pending: What it measures.
        layout: The agreed order.
        device: Where the ranks' vectors are gathered.
    """

    def __init__(self, pending: Pending, layout: Layout, device: torch.device) -> None:
        self._key = _key(pending)
        self._device = device
        self._reduction = layout.reduction
        measured, entries = pending.measurements, entries_of(pending)
        column_of = {slot: index for index, slot in enumerate(layout.slots)}
        columns = [column_of.get(slot_of(entry)) for entry in entries]
        self._has_more = None in columns
        of_entries = iter(columns)
        self._columns = [[next(of_entries) for _ in m.series] for m in measured]
        self._number_columns = list(of_entries)

        self._groups = _alike({index: m.tensor for index, m in enumerate(measured)})
        self._order = list(chain(*self._groups))
        # Weights on the device lie behind those that the host knows. Many measurements have the same one.
        on_device = {index: m.weight for index, m in enumerate(measured) if isinstance(m.weight, Tensor)}
        first_with = {id(weight): index for index, weight in reversed(on_device.items())}
        self._weight_groups = _alike({index: on_device[index] for index in sorted(first_with.values())})
        self._num_weights = 1 + len(entries) + 1  # 0, for what is not there; the entries; the flag
        starts: dict[int, int] = {}
        end = self._num_weights
        for index in chain(*self._weight_groups):
            starts[index] = end
            end += len(measured[index].series)

        # Of every slot its parts: where the value is, where the weight is, and the sign that it gets.
        parts: list[list[tuple[int, int, int]]] = [[] for _ in layout.slots]
        position = 0
        for index in self._order:
            start = starts[first_with[id(on_device[index])]] if index in on_device else 1 + position
            for entry, (series, column) in enumerate(
                zip(measured[index].series, self._columns[index], strict=True)
            ):
                if column is not None:
                    parts[column].append((position, start + entry, 1 if series.kind == "exact" else -1))
                position += 1
        for column in [*self._number_columns, column_of[FLAG]]:
            if column is not None:
                parts[column].append((position, 1 + position, 1))
            position += 1
        shape = max(map(len, parts)), len(parts)
        values_at, weights_at, signs = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.ones(shape)
        for slot, of_slot in enumerate(parts):
            for part, found in enumerate(of_slot):
                values_at[part, slot], weights_at[part, slot], signs[part, slot] = found
        self._values_at, self._weights_at = self._sent(values_at), self._sent(weights_at)
        self._signs = self._sent(signs)

        lost = [i for i, slot in enumerate(layout.slots) if is_lost(slot.series, pending.given_up)]
        if any(
            column is None and entry.series.quantity in ("grad_norm", "_other_grad_norm")
            for entry, column in zip(entries, columns, strict=True)
        ):
            lost.append(column_of[FLAG])
        self._lost = self._sent(np.array(lost)) if lost else None
        # What the host knows is sent to the device only when it changes.
        self._constants: list[object] | None = None
        self._counting: Counting | None = None
        self._numbers: list[float] | None = None

    def fits(self, pending: Pending) -> bool:
        """Whether a step has measured the same."""
        return _key(pending) == self._key

    @torch.no_grad()
    def pack(self, pending: Pending) -> Tensor:
        """What this rank adds to each slot, and its weights, 0 where there is nothing: float64 [2, slots]."""
        counting = self._count(pending)
        numbers = [*(number.value for number in pending.numbers), float(self._has_more)]
        if numbers != self._numbers:
            self._numbers, self._numbers_on_device = numbers, self._sent(np.array(numbers, np.float64))
        values = self._together([m.tensor for m in pending.measurements], self._groups)
        flat = torch.cat([*values, self._numbers_on_device])
        own = self._reduction.own(flat.take(self._values_at), counting)
        return torch.cat([own, counting.weights]).view(2, -1)

    def left_out(self, pending: Pending) -> Pending | None:
        """What has no slot, if there is anything."""
        if not self._has_more:
            return None
        more = Pending()
        for measurement, columns in zip(pending.measurements, self._columns, strict=True):
            entries = [entry for entry, column in enumerate(columns) if column is None]
            if entries:
                flat = measurement.tensor.detach().reshape(-1)
                series = [measurement.series[entry] for entry in entries]
                tensor = torch.stack([flat[entry] for entry in entries])
                more.measurements.append(measurement._replace(series=series, tensor=tensor))
        more.numbers = [
            number
            for number, column in zip(pending.numbers, self._number_columns, strict=True)
            if column is None
        ]
        more.ratios = list(pending.ratios)
        return more

    def _count(self, pending: Pending) -> Counting:
        """How the measurements count: mostly as those of the step before."""
        measured = pending.measurements
        constants: list[object] = [
            (m.factor, None if isinstance(m.weight, Tensor) else m.weight) for m in measured
        ]
        constants += [number.weight for number in pending.numbers]
        if constants != self._constants:
            self._constants, self._counting = constants, None
            factors = [measured[index].factor for index in self._order for _ in self._columns[index]]
            weights = [weight for index in self._order for weight in _host_weights(measured[index])]
            of_numbers = [number.weight for number in pending.numbers]
            ones = [1.0] * (len(of_numbers) + 1)
            sent = self._sent(np.array([*factors, *ones, 0.0, *weights, *of_numbers, 1.0], np.float64))
            self._factors = sent[: -self._num_weights].take(self._values_at)
            self._weights_on_device = sent[-self._num_weights :]
        if self._counting is None or self._weight_groups:
            of_device = self._together([m.weight for m in measured], self._weight_groups)
            flat = torch.cat([self._weights_on_device, *of_device])
            self._counting = self._reduction.count(flat.take(self._weights_at) * self._signs, self._factors)
            if self._lost is not None:
                self._counting.weights.index_fill_(0, self._lost, torch.nan)
        return self._counting

    def _together(self, tensors: Sequence[object], groups: list[list[int]]) -> list[Tensor]:
        """The entries of the tensors of each group."""
        flat = []
        for group in groups:
            chosen = (tensor for index in group if isinstance(tensor := tensors[index], Tensor))
            together = torch.hstack(list(chosen))
            # A copy to the host has to be waited for, or what is read there may not have arrived.
            is_waited_for = self._device.type != "cuda"
            flat.append(together.to(self._device, torch.float64, non_blocking=not is_waited_for))
        return flat

    def _sent(self, numbers: np.ndarray) -> Tensor:
        """Numbers of the host on the device, without waiting for it."""
        tensor = torch.from_numpy(numbers)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _alike(tensors: dict[int, Tensor]) -> list[list[int]]:
    """Groups of one device and dtype: converting scalar by scalar would launch one kernel for each."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return list(groups.values())


def _host_weights(measurement: Measurement) -> Iterable[float]:
    """Weights of a measurement's entries; 0 where the device has them."""
    weight = measurement.weight
    if isinstance(weight, Sequence):
        return weight
    return [0.0 if isinstance(weight, Tensor) else weight] * len(measurement.series)


def _key(pending: Pending) -> list[object]:
    """What decides where measurements go. Names are the same objects in every step: quickly compared."""
    first_with: dict[int, int] = {}  # which measurements have the same weight
    key: list[object] = [
        (
            m.series,
            m.is_standard_error,
            m.tensor.dtype,
            m.tensor.device,
            (first_with.setdefault(id(m.weight), index), m.weight.dtype, m.weight.device)
            if isinstance(m.weight, Tensor)
            else None,
        )
        for index, m in enumerate(pending.measurements)
    ]
    return [*key, *(number.series for number in pending.numbers), pending.given_up]
