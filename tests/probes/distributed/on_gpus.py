"""Trainings with a GPU for each rank, over NCCL.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.probes.distributed.faults import RARELY, nan_gradient, train_with_nan
from tests.probes.distributed.launch import Result, main
from tests.probes.distributed.parallel_models import ddp_model, fsdp_model
from tests.probes.distributed.trainings import as_rows, own_part, train


def ddp_on_gpus(directory: Path) -> Result:
    return as_rows(train(ddp_model("cuda"), _own_part))


def fsdp_on_gpus(directory: Path) -> Result:
    return as_rows(train(_fsdp_model(), _own_part))


def nan_in_backward_on_gpus(directory: Path) -> Result:
    return train_with_nan(nan_gradient, step_of_nan=4, make_model=_fsdp_model, **RARELY)


def _fsdp_model() -> nn.Module:
    return fsdp_model("cuda")


def _own_part(whole: Tensor) -> Tensor:
    return own_part(whole).cuda()


if __name__ == "__main__":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    main(globals(), "nccl")
