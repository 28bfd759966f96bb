"""How long one step takes: on the device, and on the host.

Machines are noisy, so nothing is timed alone: a pair is one step of each contender, one right after the other and in
alternating order, and what counts is the ratio of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from gradfast.bench.noise import LENGTH

Step = Callable[[], object]


class Sample(NamedTuple):
    """One step, in seconds."""

    device: float  # from the first kernel's start to the last one's end; on a CPU the whole call
    host: float  # until the call returned
    host_hidden: bool = True  # CUDA: the host was done before the device began, so its time is not in `device`


class Clock(Protocol):
    """Times one step on one kind of device."""

    def sample(self, step: Step) -> Sample: ...


class Flusher:
    """Turns the caches over, so that a step finds its tensors in memory as after a large model's backward pass."""

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        self._buffer = torch.zeros(max(2 * cache_bytes // 4, 1), device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


class CpuClock:
    """The whole call is both the device's and the host's time."""

    def __init__(self, flush: bool) -> None:
        self._flush = Flusher(torch.device("cpu"), cpu_cache_bytes()) if flush else None

    def sample(self, step: Step) -> Sample:
        if self._flush is not None:
            self._flush()
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        return Sample(elapsed, elapsed)


class CudaClock:
    """Events around the step, behind a busy wait on the device that outlasts the host's part of the step.

    Without the wait the device would idle while Python prepares the next launch, and the events would show Python.
    """

    LONGEST_WAIT = 1.0  # seconds
    TRIES = 8

    def __init__(self, device: torch.device, flush: bool) -> None:
        self._device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flush = Flusher(device, max(cache, 64 << 20)) if flush else None
        self._wait = 2e-4
        self._cycles_per_second = self._measure_clock()

    def sample(self, step: Step) -> Sample:
        for _ in range(self.TRIES):
            found = self._try(step)
            if found.host_hidden:
                break
            self._wait = min(2 * max(self._wait, found.host), self.LONGEST_WAIT)
        return found

    def _try(self, step: Step) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        if self._flush is not None:
            self._flush()
        torch.cuda._sleep(int(self._wait * self._cycles_per_second))
        start.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        end.record()
        hidden = not start.query()
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3, host, hidden)

    def _measure_clock(self) -> float:
        cycles = 20_000_000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one warms up
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (start.elapsed_time(end) / 1e3)


def make_clock(device: torch.device, flush: bool) -> Clock:
    return CudaClock(device, flush) if device.type == "cuda" else CpuClock(flush)


class Pair(NamedTuple):
    ours: Sample
    peer: Sample

    @property
    def ratio(self) -> float:
        return self.ours.device / self.peer.device


def interleave(clock: Clock, ours: Step, peer: Step, pairs: int, seconds: float, fewest: int = 5) -> list[Pair]:
    """Time up to `pairs` pairs, fewer (but at least `fewest`) when they take longer than `seconds`."""
    for warm_up in (ours, peer, ours, peer):
        clock.sample(warm_up)
    found: list[Pair] = []
    end = time.perf_counter() + seconds
    while len(found) < pairs and (len(found) < fewest or time.perf_counter() < end):
        if len(found) % 2:
            peer_sample, our_sample = clock.sample(peer), clock.sample(ours)
        else:
            our_sample, peer_sample = clock.sample(ours), clock.sample(peer)
        found.append(Pair(our_sample, peer_sample))
    return found


def host_seconds(step: Step, times: int = 200, seconds: float = 1.0) -> list[float]:
    """Time the whole call of a step on tensors so small that only the host's work is left."""
    for _ in range(5):
        step()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < times and (len(found) < 5 or time.perf_counter() < end):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def copy_bandwidth(device: torch.device, times: int = 7) -> float:
    """Bytes a second that `copy_` reads and writes, the best of several: what this memory is known to do."""
    source, target = _beyond_caches(device), _beyond_caches(device)
    return _best_bandwidth(lambda: target.copy_(source), target, times)


def memory_bandwidth(device: torch.device, times: int = 9) -> float:
    """Bytes a second that the memory is known to read and write at this moment.

    On CUDA that of a copy. On a CPU that of a product in place: a copy first reads the lines that it is going to write,
    which a step does not.
    """
    if device.type == "cuda":
        return copy_bandwidth(device, times)
    tensor = _beyond_caches(device)
    return _best_bandwidth(lambda: tensor.mul_(1.0), tensor, times)


def _beyond_caches(device: torch.device) -> torch.Tensor:
    return torch.ones(32 * LENGTH if device.type == "cpu" else 256 * LENGTH, device=device)  # 134 MB, 1.07 GB


def _best_bandwidth(function: Step, written: torch.Tensor, times: int) -> float:
    """Of a function that reads as many bytes as it writes to `written`."""
    clock = make_clock(written.device, flush=False)
    return 2 * written.nbytes / min(clock.sample(function).device for _ in range(times))


def cpu_cache_bytes() -> int:
    """The last level of cache that the first core sees, at least 32 MiB and at most 256 (of which a part is ours)."""
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found = max(found, int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return min(max(found, 32 << 20), 256 << 20)


def middle(values: Sequence[float]) -> float:
    """The median."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
