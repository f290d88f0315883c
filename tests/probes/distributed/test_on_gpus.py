"""A GPU for each rank, over NCCL: numbers of one process, and who is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.probes.distributed.launch import results, rows, run
from tests.probes.distributed.test_faults import assert_blamed
from tests.probes.distributed.test_same_numbers import assert_close
from tests.probes.distributed.trainings import as_rows, model, train

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.gpu,
]


def test_on_two_gpus(tmp_path: Path) -> None:
    run(tmp_path, 2, "on_gpus", ["ddp_on_gpus", "fsdp_on_gpus", "nan_in_backward_on_gpus"])
    expected = as_rows(train(model()))
    for scenario in ("ddp_on_gpus", "fsdp_on_gpus"):
        assert_close(rows(tmp_path, 2, scenario), expected, tolerance=1e-4)
    for result in results(tmp_path, 2, "nan_in_backward_on_gpus"):
        assert_blamed(result, 4, "blocks.1.up", "grad_norm")
