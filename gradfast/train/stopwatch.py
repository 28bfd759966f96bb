"""Where the time of training goes: waiting for data, forward, backward, the optimiser's step, and the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

PHASES = ("data", "forward", "backward", "step")  # and "other": showing, saving


class Span(NamedTuple):
    """From one mark to the next: seconds of `perf_counter` on a CPU, events of the stream on CUDA."""

    phase: str
    begin: Any
    end: Any


class Stopwatch:
    """Puts a mark where one phase ends and the next begins; what lies between two marks is the later one's phase.

    On CUDA a mark is an event in the stream: the device notes the time when it gets there, and nobody waits. The host
    is ahead of the device, so its own clock would tell nothing but how long launching takes. A device that has nothing
    to do until the next batch has been read spends that time before the mark after "data", which is where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[Span] = []
        self._last = self._mark()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Start with an epoch: what was before is not training."""
        self._spans.clear()
        self._last = self._mark()

    def lap(self, phase: str) -> None:
        """The time since the last mark was this phase's."""
        now = self._mark()
        self._spans.append(Span(phase, self._last, now))
        self._last = now

    def take(self) -> list[Span]:
        """The spans since the last call."""
        spans, self._spans = self._spans, []
        return spans


def durations(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by phase. On CUDA the device must have passed the last mark."""
    found: dict[str, float] = {}
    for phase, begin, end in spans:
        seconds = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        found[phase] = found.get(phase, 0.0) + seconds
    return found
