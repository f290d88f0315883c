"""The order in which every rank sends its scalars, and how one rank's measurements get into it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from probes.guard import is_lost
from probes.joining import exact
from probes.pending import Measurement, Pending, Ratio
from probes.quantities import largest, reduction_of
from probes.rank_reduction import RankReduction
from probes.record import ALL_LAYERS, Series

_SOMETHING_ELSE = Series(ALL_LAYERS, "_something_else")


class Slot(NamedTuple):
    """One entry of what every rank sends.

    Attributes:
        series: What it is. Whether it is exact, each rank's weight tells.
        is_standard_error: Whether it is the standard error of that.
    """

    series: Series
    is_standard_error: bool


# The last slot of every layout: 1 where a rank has measured something that has no slot. If that is a part of
# the norm of the whole gradient, the weight is NaN.
_FLAG = Slot(_SOMETHING_ELSE, False)


class Layout:
    """The order that the ranks have agreed on for one kind of step.

    Args:
        slots: In this order.
        ratios: What is formed of the joined values.
        device: Where the ranks' vectors are gathered.
        inexact: Names of values that are not exact, by those of exact ones.

    Attributes:
        reduction: Joins what is gathered.
        expires: Number of the transfer from which on the ranks agree anew, since one has measured something
            else.
        packing: How this rank packs; None before the first time.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        ratios: Sequence[Ratio],
        device: torch.device,
        inexact: Mapping[Series, Series] | None = None,
    ) -> None:
        self.slots = [*slots, _FLAG]
        self.ratios = list(ratios)
        self._inexact = dict(inexact or {})
        self.reduction = RankReduction(
            [slot.series for slot in self.slots], [slot.is_standard_error for slot in self.slots], device
        )
        self.expires = math.inf
        self.packing: Packing | None = None

    def inexact(self, series: Series) -> Series:
        """The name of a value that is not exact on every rank."""
        name = self._inexact.get(series)
        if name is None:  # when the ranks agreed, batches were short enough for all of their rows
            is_maximum = reduction_of(series.quantity) is largest
            name = series._replace(kind="lower_bound" if is_maximum else "estimate")
            self._inexact[series] = name
        return name


def agree(pending: Pending, device: torch.device, group: dist.ProcessGroup) -> Layout:
    """The union of what the ranks have measured. Every rank waits for every other.

    Ranks that measure the same exchange digests only. Else each different list is sent once.

    Args:
        pending: What this rank has measured.
        device: Where the ranks' vectors will be gathered.
        group: The ranks.
    """
    mine = list(dict.fromkeys(_entries(pending))), list(dict.fromkeys(pending.ratios))
    digests: list[bytes] = [b""] * group.size()
    dist.all_gather_object(digests, hashlib.sha256(repr(mine).encode()).digest(), group)
    different = list(dict.fromkeys(digests))
    entries: dict[Slot, None] = {}
    ratios: dict[Ratio, None] = {}
    for digest in different:
        sent = [mine]
        if len(different) > 1:
            sender = dist.get_global_rank(group, digests.index(digest))
            dist.broadcast_object_list(sent, sender, group, device)
        entries.update(dict.fromkeys(sent[0][0]))
        ratios.update(dict.fromkeys(sent[0][1]))
    inexact = {exact(series): series for series, _ in entries if series.kind != "exact"}
    return Layout(_slots(entries), list(ratios), device, inexact)


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
        position = {slot: index for index, slot in enumerate(layout.slots)}
        self._size = len(position) + 1  # the last entry is for what has no slot
        entries = _entries(pending)
        part_of: Counter[int] = Counter()
        flat = []
        for slot in map(_slot, entries):
            column = position.get(slot, self._size - 1)
            flat.append(column + part_of[column] * self._size)
            if column < self._size - 1:
                part_of[column] += 1
        self._num_parts = max(part_of.values(), default=1)
        places = iter(flat)
        self._places = [[next(places) for _ in m.series] for m in pending.measurements]
        self._number_places = list(places)
        self._signs = [[-1.0 if s.kind != "exact" else 1.0 for s in m.series] for m in pending.measurements]
        self._has_more = self._size - 1 in flat
        self._reduction = layout.reduction
        lost = [i for i, slot in enumerate(layout.slots) if is_lost(slot.series, pending.given_up)]
        if any(
            place == self._size - 1 and entry.series.quantity in ("grad_norm", "_other_grad_norm")
            for entry, place in zip(entries, flat, strict=True)
        ):
            lost.append(position[_FLAG])
        self._lost = torch.tensor(lost, dtype=torch.int64).to(device) if lost else None

        # Dtype by dtype: converting scalar by scalar would launch one kernel for each.
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, measurement in enumerate(pending.measurements):
            groups.setdefault((measurement.tensor.device, measurement.tensor.dtype), []).append(index)
        self._groups = list(groups.values())
        self._order = list(chain(*self._groups))
        # Weights that the host knows come first, because they are copied to the device only when they change.
        self._host_weighted = [
            i for i, m in enumerate(pending.measurements) if not isinstance(m.weight, Tensor)
        ]
        self._device_weighted = [
            i for i, m in enumerate(pending.measurements) if isinstance(m.weight, Tensor)
        ]
        self._value_places = self._indices(self._order)
        self._weight_places = self._indices([*self._host_weighted, *self._device_weighted])
        self._constants: list[float] = []
        self._constants_on_device = torch.empty(0)

    def fits(self, pending: Pending) -> bool:
        """Whether a step has measured the same."""
        return _key(pending) == self._key

    def pack(self, pending: Pending) -> Tensor:
        """Values and weights in the agreed order, 0 where there is none: float64 [2, slots]."""
        measured = pending.measurements
        factors, weights, signs = self._constants_of(measured)
        values = [self._together([measured[index].tensor for index in group]) for group in self._groups]
        counts = [measured[index].weight for index in self._device_weighted]
        numbers = [[n.value for n in pending.numbers], [n.weight for n in pending.numbers]]
        numbers[0].append(float(self._has_more))
        numbers[1].append(1.0)
        of_numbers = to_device(torch.tensor(numbers, dtype=torch.float64), self._device)
        packed = torch.zeros(2, self._num_parts * self._size, dtype=torch.float64, device=self._device)
        packed[0].index_copy_(
            0, self._value_places, torch.cat([torch.cat([factors[:0], *values]) * factors, of_numbers[0]])
        )
        on_device = [signs[:0], *(self._together([c]) for c in counts if isinstance(c, Tensor))]
        packed[1].index_copy_(
            0, self._weight_places, torch.cat([weights, torch.cat(on_device) * signs, of_numbers[1]])
        )
        parts = packed.view(2, self._num_parts, self._size)[:, :, :-1]
        joined = self._reduction.join_parts(*parts) if self._num_parts > 1 else parts[:, 0]
        if self._lost is not None:
            joined[1].index_fill_(0, self._lost, torch.nan)
        return joined

    def left_out(self, pending: Pending) -> Pending | None:
        """What has no slot, if there is anything."""
        if not self._has_more:
            return None
        more = Pending()
        for measurement, places in zip(pending.measurements, self._places, strict=True):
            entries = [entry for entry, place in enumerate(places) if place == self._size - 1]
            if entries:
                flat = measurement.tensor.detach().reshape(-1)
                series = [measurement.series[entry] for entry in entries]
                tensor = torch.stack([flat[entry] for entry in entries])
                more.measurements.append(measurement._replace(series=series, tensor=tensor))
        more.numbers = [
            number
            for number, place in zip(pending.numbers, self._number_places, strict=True)
            if place == self._size - 1
        ]
        more.ratios = list(pending.ratios)
        return more

    def _indices(self, order: Iterable[int]) -> Tensor:
        places = [*chain(*(self._places[index] for index in order)), *self._number_places, self._size - 2]
        return torch.tensor(places, dtype=torch.int64).to(self._device)

    def _together(self, tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        # A copy to the host has to be waited for, or what is read there may not have arrived.
        return flat.to(self._device, torch.float64, non_blocking=self._device.type == "cuda")

    def _constants_of(self, measured: list[Measurement]) -> Sequence[Tensor]:
        """Factors of all values; weights that the host knows; signs of the others."""
        factors = [measured[index].factor for index in self._order for _ in self._places[index]]
        weights: list[float] = []
        for index in self._host_weighted:
            weight = measured[index].weight
            if isinstance(weight, Sequence):
                weights += [w * sign for w, sign in zip(weight, self._signs[index], strict=True)]
            elif not isinstance(weight, Tensor):
                weights += [weight * sign for sign in self._signs[index]]
        signs = [*chain(*(self._signs[index] for index in self._device_weighted))]
        constants = factors + weights + signs
        if constants != self._constants or not constants:
            self._constants = constants
            self._constants_on_device = to_device(torch.tensor(constants, dtype=torch.float64), self._device)
        return self._constants_on_device.split([len(factors), len(weights), len(signs)])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def slots_of(pending: Pending) -> list[Slot]:
    """A slot for each series, in the order in which they were measured."""
    return _slots(_entries(pending))


def _slots(entries: Iterable[Slot]) -> list[Slot]:
    return list(dict.fromkeys(map(_slot, entries)))


def _slot(entry: Slot) -> Slot:
    return entry if entry.series.kind == "exact" else entry._replace(series=exact(entry.series))


def _entries(pending: Pending) -> list[Slot]:
    """What each scalar is, in the order in which they were measured, with what is not exact named so."""
    measured = [Slot(series, m.is_standard_error) for m in pending.measurements for series in m.series]
    return measured + [Slot(number.series, False) for number in pending.numbers]


def _key(pending: Pending) -> list[tuple[object, ...]]:
    """What decides where measurements go. Names are the same objects in every step: quickly compared."""
    key: list[tuple[object, ...]] = [
        (m.series, m.is_standard_error, m.tensor.dtype, m.tensor.device, isinstance(m.weight, Tensor))
        for m in pending.measurements
    ]
    return [*key, *((number.series,) for number in pending.numbers), tuple(sorted(pending.given_up))]
