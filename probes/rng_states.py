"""The states of the random number generators that a training script draws from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE_NAME = "rng_states.pt"


def rng_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, on the CPU and on CUDA devices in use.

    All of them are kept on the host: nothing waits for a device. What ``torch.load`` accepts with
    ``weights_only``.
    """
    name, key, *rest = np.random.get_state()  # noqa: NPY002 (the global generator is what scripts draw from)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def load_rng_states(incident: str | Path) -> int:
    """Puts the generators back to where they were at the last checkpoint before an incident.

    That is when ``probe.state_dict()`` or ``probe.load_state_dict(…)`` was last called, or the probe
    attached. Call it with the model and the optimizer of that step loaded, right before the step is repeated.
    Generators of the script's own (``torch.Generator``, ``numpy.random.default_rng``) are not among them.

    Args:
        incident: The incident's folder.

    Returns:
        The step that comes next, counted as records count.

    Raises:
        FileNotFoundError: If the folder holds no states.

    Example:
        >>> import tempfile, torch, probes
        >>> from pathlib import Path
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as log_dir:
        ...     with probes.attach(model, optimizer, log_dir=log_dir, on_divergence="ignore") as probe:
        ...         first = torch.rand(())
        ...         model(torch.full((1, 2), torch.nan)).sum().backward()
        ...         optimizer.step()
        ...     step = load_rng_states(next(Path(log_dir).glob("incidents/*non-finite")))
        >>> step, bool(torch.rand(()) == first)
        (0, True)
    """
    saved = torch.load(Path(incident) / FILE_NAME, weights_only=True)["checkpoint"]
    states = saved["states"]
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    return saved["step"]
