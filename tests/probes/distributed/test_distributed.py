"""Which process groups a probe takes, and where their ranks gather, without other ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import probes
from probes.distributed import gathering_device
from tests.probes.distributed.trainings import model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")


@pytest.mark.parametrize("backends", ["cpu:gloo,cuda:nccl", "gloo"])
def test_ranks_gather_where_the_model_is(backends: str) -> None:
    assert gathering_device(backends, model()) == torch.device("cpu")


def test_ranks_gather_on_the_gpu_of_the_model_whichever_is_current() -> None:
    on_third = mock.Mock(parameters=lambda: iter([mock.Mock(device=torch.device("cuda:2"))]))
    assert gathering_device("cpu:gloo,cuda:nccl", on_third) == torch.device("cuda:2")


def test_other_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="must use nccl or gloo; it uses mpi"):
        gathering_device("mpi", model())


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ValueError, match="torch.distributed is not initialized"):
        probes.attach(model(), process_group=object())  # type: ignore[arg-type]
