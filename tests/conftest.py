from __future__ import annotations

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    # The tensors here are small: a second thread costs more than it saves, and two cores may be all there is.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (scanpy and scikit-learn draw from the global generator)
