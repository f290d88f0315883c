"""A step's scalars of all ranks: gathered at once, joined where they arrive, and copied to the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from probes.joining import GLOBAL_GRAD_NORM, join
from probes.layout import Layout
from probes.packing import Packing
from probes.pending import Pending
from probes.record import Series, StepRecords
from probes.transfer import Transfer

# What is gathered at a time: with a thousand ranks, the statistics of every head come to a gigabyte.
MAX_GATHERED_BYTES = 2**26
_BYTES_PER_SLOT = 16  # a value and a weight


class Lane:
    """The ranks, and where their vectors meet.

    Args:
        group: The ranks.
        device: Where.

    Attributes:
        stream: On CUDA, beside the stream that trains, which waits for nothing.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._group = group
        self._slots_at_once = slots_at_once(group.size())

    def all_gather(self, packed: Tensor) -> Iterator[tuple[Tensor, dist.Work]]:
        """Every rank's values and weights [2, slots], in as few pieces as memory allows.

        Yields:
            [ranks, 2, slots of the piece], once the work is done.
        """
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        for piece in packed.split(self._slots_at_once, dim=1):
            gathered = piece.new_empty(self._group.size() * piece.numel())
            work = gather(gathered, piece.reshape(-1), group=self._group, async_op=True)
            yield gathered.view(-1, *piece.shape), work


def slots_at_once(num_ranks: int) -> int:
    """How many slots of so many ranks are gathered at a time."""
    return max(1, MAX_GATHERED_BYTES // (num_ranks * _BYTES_PER_SLOT))


class GlobalTransfer:
    """The joined scalars of one step of all ranks, on their way to this rank's host; to every other's too.

    Args:
        step: The step.
        number: How many transfers there were before, on every rank.
        pending: What this rank has measured.
        layout: The agreed order.
        lane: Where it goes.

    Attributes:
        left_out: What this rank has measured and the layout has no slot for, if anything.
        first_broken: After ``wait``: of series that are not finite on some ranks only, the first of these.
    """

    def __init__(self, step: int, number: int, pending: Pending, layout: Layout, lane: Lane) -> None:
        self.step = step
        self.first_broken: dict[Series, int] = {}
        self._number = number
        self._layout = layout
        self._pending = pending  # kept, because another stream reads it
        self._arrived: torch.cuda.Event | None = None
        if lane.stream is None:
            self._packing = _packing(pending, layout, lane)
            self._gathered = list(lane.all_gather(self._packing.pack(pending)))
        else:
            lane.stream.wait_stream(torch.cuda.current_stream(lane.device))
            with torch.cuda.stream(lane.stream):
                self._packing = _packing(pending, layout, lane)  # kept, like what it packs
                joined = self._join(lane.all_gather(self._packing.pack(pending)))
                self._host = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
                self._host.copy_(joined, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record(lane.stream)
        self.left_out = self._packing.left_out(pending)

    @property
    def has_device(self) -> bool:
        """Whether a device writes to memory of this process."""
        return self._arrived is not None

    def wait(self) -> StepRecords:
        """The step's records. Waits for them if they have not arrived; one step later they have."""
        if self._arrived is None:
            self._host = self._join(self._gathered)
        else:
            self._arrived.synchronize()
        joined = self._layout.reduction.finish(self._host.numpy())
        if joined.values[-1] != 0:  # the flag: some rank has measured more
            # Ranks read this at different times, though all of them before the next transfer but one.
            self._layout.expires = min(self._layout.expires, self._number + 2)
        slots = self._layout.slots[:-1]
        self.first_broken = {
            slots[index].series: rank for index, rank in joined.first_broken.items() if index < len(slots)
        }
        records = join(self.step, self._layout.parts(joined), (), self._layout.ratios)
        # Where gradients of other layers were left out, what has been joined is not the whole model's.
        return records if joined.is_there[-1] else records.without([GLOBAL_GRAD_NORM])

    def _join(self, pieces: Iterable[tuple[Tensor, dist.Work]]) -> Tensor:
        joined, first_slot = [], 0
        for gathered, work in pieces:
            work.wait()  # on CUDA the stream does; the host goes on
            joined.append(self._layout.reduction.over_ranks(gathered, first_slot))
            first_slot += gathered.shape[2]
        return torch.cat(joined, dim=1) if len(joined) > 1 else joined[0]


def _packing(pending: Pending, layout: Layout, lane: Lane) -> Packing:
    if layout.packing is None or not layout.packing.fits(pending):
        layout.packing = Packing(pending, layout, lane.device)
    return layout.packing


class LocalTransfer(Transfer):
    """Scalars of one rank, of which the others know nothing; their records name the rank.

    Args:
        step: The step.
        pending: The scalars.
        rank: Whose they are.
    """

    def __init__(self, step: int, pending: Pending, rank: int) -> None:
        super().__init__(step, pending)
        self._rank = rank

    def wait(self) -> StepRecords:
        """See :class:`probes.transfer.Transfer`."""
        # Of the gradients' parts some may have been joined: these make no norm of the whole model.
        records = super().wait().without([GLOBAL_GRAD_NORM])
        return records._replace(series=tuple(name._replace(rank=self._rank) for name in records.series))
