"""Where a result comes from: software versions, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "numpy", "scipy", "scanpy", "anndata", "tensorboard", "matplotlib")


def provenance(device: str) -> dict[str, Any]:
    """Versions, hardware and commit, ready for JSON.

    Args:
        device: "cpu" or "cuda"; a GPU is named only where one was used.

    Returns:
        Keys "versions" (absent packages are None), "hardware" and "commit" (None outside a git checkout;
        "-dirty" is appended where tracked files differ from it).
    """
    hardware: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["cuda"] = torch.version.cuda
        hardware["gpu_peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    versions["torch"] = torch.__version__  # tells a CUDA build from a CPU build, which metadata may not
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    return answer.stdout.strip() or None
