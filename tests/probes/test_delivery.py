"""What fails on the way to the sinks does not reach the training."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch

import probes
from probes.delivery import Delivery
from probes.pending import Pending
from probes.record import ALL_LAYERS, Series


@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_one_rank_has_alone_and_cannot_copy_is_given_up(is_recorded: bool) -> None:
    ranks = mock.Mock()
    ranks.is_due.return_value = is_recorded
    ranks.start_alone.side_effect = torch.OutOfMemoryError("planted")
    delivery = Delivery([], [], mock.Mock(), ranks=ranks)
    pending = Pending()
    pending.add_number(Series(ALL_LAYERS, "loss"), 1.0)
    with pytest.warns(probes.ProbeWarning, match="the numbers of step 3 could not be copied"):
        delivery.send(3, pending)
    assert ranks.start.called == is_recorded  # what the others wait for


def test_a_transfer_that_a_fault_has_cut_short_is_never_freed() -> None:
    class Faulted:
        step, has_device = 3, True

        def wait(self) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

    delivery = Delivery([], [], mock.Mock())
    pending = Pending()
    pending.add_number(Series(ALL_LAYERS, "loss"), 1.0)
    with mock.patch("probes.delivery.Transfer", return_value=Faulted()):
        delivery.send(3, pending)
    transfer = weakref.ref(delivery._in_flight.transfer)
    with pytest.warns(probes.ProbeWarning, match="the numbers of step 3 could not be copied"):
        delivery.close(silently=True)
    del delivery
    gc.collect()
    assert transfer() is not None
