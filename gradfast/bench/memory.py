"""How much memory a step allocates for its own use, at its peak."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from gradfast.bench.timing import Step


def peak_extra_bytes(device: torch.device, step: Step) -> int:
    """Bytes that one call of `step` holds, at most, beyond what was allocated before it (by torch's allocators)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return peak(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def peak(changes: Iterable[int]) -> int:
    """The highest running sum of allocations (positive) and releases (negative), at least 0."""
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest
