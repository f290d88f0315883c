"""The order in which every rank sends its scalars, and the names of what arrives."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from probes.joining import Parts, exact
from probes.pending import Pending, Ratio
from probes.quantities import largest, reduction_of
from probes.rank_reduction import Joined, RankReduction
from probes.record import ALL_LAYERS, Series

if TYPE_CHECKING:
    from probes.packing import Packing

_SOMETHING_ELSE = Series(ALL_LAYERS, "_something_else")
_MAX_KNOWN = 16


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
FLAG = Slot(_SOMETHING_ELSE, False)


class _Named(NamedTuple):
    """Names of joined values, or of standard errors, and the slots where these are."""

    series: tuple[Series, ...]
    slots: np.ndarray
    are_standard_errors: bool


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
        self.slots = [*slots, FLAG]
        self.ratios = list(ratios)
        self._inexact = dict(inexact or {})
        self.reduction = RankReduction(
            [slot.series for slot in self.slots], [slot.is_standard_error for slot in self.slots], device
        )
        self.expires = math.inf
        self.packing: Packing | None = None
        self._known: dict[tuple[bytes, bytes], list[_Named]] = {}

    def parts(self, joined: Joined) -> list[Parts]:
        """What the ranks have joined, with its names: the same objects in all steps that have the same."""
        key = joined.is_there.tobytes(), joined.is_exact.tobytes()
        known = self._known.get(key)
        if known is None:
            if len(self._known) == _MAX_KNOWN:
                self._known.clear()
            known = self._known[key] = [
                self._named(joined, is_standard_error=is_error) for is_error in (False, True)
            ]
        return [(names, joined.values[indices].tolist(), 1.0, is_error) for names, indices, is_error in known]

    def _named(self, joined: Joined, *, is_standard_error: bool) -> _Named:
        names, indices = [], []
        columns = zip(self.slots[:-1], joined.is_there, joined.is_exact, strict=False)
        for index, ((series, is_error), is_there, is_exact) in enumerate(columns):
            if is_there and is_error == is_standard_error:
                names.append(series if is_exact else self.inexact(series))
                indices.append(index)
        return _Named(tuple(names), np.array(indices, dtype=np.int64), is_standard_error)

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
    mine = list(dict.fromkeys(entries_of(pending))), list(dict.fromkeys(pending.ratios))
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


def slots_of(pending: Pending) -> list[Slot]:
    """A slot for each series, in the order in which they were measured."""
    return _slots(entries_of(pending))


def _slots(entries: Iterable[Slot]) -> list[Slot]:
    return list(dict.fromkeys(map(slot_of, entries)))


def slot_of(entry: Slot) -> Slot:
    """Where an entry goes: a slot takes values that are exact and such that are not."""
    return entry if entry.series.kind == "exact" else entry._replace(series=exact(entry.series))


def entries_of(pending: Pending) -> list[Slot]:
    """What each scalar is, in the order in which they were measured, with what is not exact named so."""
    measured = [Slot(series, m.is_standard_error) for m in pending.measurements for series in m.series]
    return measured + [Slot(number.series, False) for number in pending.numbers]
