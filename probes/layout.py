"""The order in which every rank sends its scalars, and how one rank's measurements get into it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from probes.pending import Measurement, Pending, Ratio
from probes.rank_reduction import RankReduction
from probes.record import ALL_LAYERS, Series

_SOMETHING_ELSE = Series(ALL_LAYERS, "_something_else")


class Slot(NamedTuple):
    """One entry of what every rank sends.

    Attributes:
        series: What it is.
        is_standard_error: Whether it is the standard error of that.
        part: Which of several measurements of the series in one step.
    """

    series: Series
    is_standard_error: bool
    part: int


# The last slot of every layout: 1 where a rank has measured something that has no slot.
_FLAG = Slot(_SOMETHING_ELSE, False, 0)


class Layout:
    """The order that the ranks have agreed on for one kind of step.

    Args:
        slots: In this order.
        ratios: What is formed of the joined values.
        device: Where the ranks' vectors are gathered.

    Attributes:
        reduction: Joins what is gathered.
        expires: Number of the transfer from which on the ranks agree anew, since one has measured something
            else.
        packing: How this rank packs; None before the first time.
    """

    def __init__(self, slots: Sequence[Slot], ratios: Sequence[Ratio], device: torch.device) -> None:
        self.slots = [*slots, _FLAG]
        self.ratios = list(ratios)
        self.reduction = RankReduction(
            [slot.series for slot in self.slots], [slot.is_standard_error for slot in self.slots], device
        )
        self.expires = math.inf
        self.packing: Packing | None = None


def agree(pending: Pending, device: torch.device, group: dist.ProcessGroup) -> Layout:
    """The union of what the ranks have measured. Every rank waits for every other.

    Ranks that measure the same exchange digests only. Else each different list is sent once.

    Args:
        pending: What this rank has measured.
        device: Where the ranks' vectors will be gathered.
        group: The ranks.
    """
    mine = slots_of(pending), list(dict.fromkeys(pending.ratios))
    digests: list[bytes] = [b""] * group.size()
    dist.all_gather_object(digests, hashlib.sha256(repr(mine).encode()).digest(), group)
    different = list(dict.fromkeys(digests))
    slots: dict[Slot, None] = {}
    ratios: dict[Ratio, None] = {}
    for digest in different:
        sent = [mine]
        if len(different) > 1:
            sender = dist.get_global_rank(group, digests.index(digest))
            dist.broadcast_object_list(sent, sender, group, device)
        slots.update(dict.fromkeys(sent[0][0]))
        ratios.update(dict.fromkeys(sent[0][1]))
    return Layout(list(slots), list(ratios), device)


class Packing:
    """Puts one rank's measurements into a layout, as long as it measures the same at this kind of step.

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
        places = iter([position.get(slot, self._size - 1) for slot in slots_of(pending)])
        self._places = [[next(places) for _ in m.series] for m in pending.measurements]
        self._number_places = list(places)
        self._has_more = self._size - 1 in chain(*self._places, self._number_places)

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
        factors, weights = self._factors_and_weights(measured)
        values = [self._together([measured[index].tensor for index in group]) for group in self._groups]
        counts = [measured[index].weight for index in self._device_weighted]
        numbers = [[n.value for n in pending.numbers], [n.weight for n in pending.numbers]]
        numbers[0].append(float(self._has_more))
        numbers[1].append(1.0)
        of_numbers = to_device(torch.tensor(numbers, dtype=torch.float64), self._device)
        packed = torch.zeros(2, self._size, dtype=torch.float64, device=self._device)
        packed[0].index_copy_(
            0, self._value_places, torch.cat([torch.cat([factors[:0], *values]) * factors, of_numbers[0]])
        )
        packed[1].index_copy_(
            0,
            self._weight_places,
            torch.cat(
                [weights, *(self._together([c]) for c in counts if isinstance(c, Tensor)), of_numbers[1]]
            ),
        )
        return packed[:, :-1]

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

    def _factors_and_weights(self, measured: list[Measurement]) -> Sequence[Tensor]:
        factors = [measured[index].factor for index in self._order for _ in self._places[index]]
        weights: list[float] = []
        for index in self._host_weighted:
            weight = measured[index].weight
            if isinstance(weight, Sequence):
                weights += weight
            elif not isinstance(weight, Tensor):
                weights += [weight] * len(self._places[index])
        constants = factors + weights
        if constants != self._constants or not constants:
            self._constants = constants
            self._constants_on_device = to_device(torch.tensor(constants, dtype=torch.float64), self._device)
        return self._constants_on_device.split([len(factors), len(weights)])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def slots_of(pending: Pending) -> list[Slot]:
    """A slot for each scalar, in the order in which they were measured."""
    parts: Counter[tuple[Series, bool]] = Counter()
    slots = []
    named = [(m.series, m.is_standard_error) for m in pending.measurements]
    for names, is_standard_error in [*named, ([number.series for number in pending.numbers], False)]:
        for series in names:
            slots.append(Slot(series, is_standard_error, parts[series, is_standard_error]))
            parts[series, is_standard_error] += 1
    return slots


def _key(pending: Pending) -> list[tuple[object, ...]]:
    """What decides where measurements go. Names are the same objects in every step: quickly compared."""
    key: list[tuple[object, ...]] = [
        (m.series, m.is_standard_error, m.tensor.dtype, m.tensor.device, isinstance(m.weight, Tensor))
        for m in pending.measurements
    ]
    return [*key, *((number.series,) for number in pending.numbers)]
