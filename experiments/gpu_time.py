"""What a GPU computes, kernel by kernel, from the profiler.

Between two CUDA events a GPU also waits for its host, which small kernels launched one by one would show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch


def gpu_times(function: Callable[[], object], calls: int) -> tuple[Counter[str], int]:
    """Time of the kernels and copies that a function launches.

    Args:
        function: Called once before, for what it compiles and tunes.
        calls: How often it is called while the profiler looks.

    Returns:
        Kernel → milliseconds a call; how many kernels and copies a call launches.
    """
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    launches = 0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3 / calls
            launches += 1
    return times, launches // calls
