"""How many kernels a step launches, as the profiler sees them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from gradfast.bench.timing import Step

# Calls of the CUDA runtime or driver that start a kernel: cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx,
# cudaLaunchCooperativeKernel and so on. The device's own timeline would also show copies, fills and named ranges.
_LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel")


def launches_of(step: Step) -> list[str]:
    """Run `step` once on the current CUDA device and return the calls by which it launched kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return launch_calls(event.name for event in profiler.events() or ())


def launch_calls(names: Iterable[str]) -> list[str]:
    """Those of the profiler's event names that are launches."""
    return [name for name in names if _LAUNCH.match(name)]
