"""Ctrl-C and SIGTERM as a request that the loop grants between two steps, after saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Within ``with StopRequest() as stop``, the first signal sets `stop.signal`; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.

    Args:
        shared: of several processes, which must stop at the same step: `signal` is set when all have agreed, as
            `agree` is told, and further signals are ignored, since torchrun repeats what the terminal sent to all.

    Attributes:
        received: the signal that came to this process.
        signal: the signal that the run stops for.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.received: signal.Signals | None = None
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it; 0 where none came."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def votes(self) -> list[float]:
        """1 for the one of `SIGNALS` that came to this process, 0 for the others."""
        return [float(self.received == number) for number in SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """Stop for the first of `SIGNALS` that came to any process, given the sums of all `votes`."""
        for number, count in zip(SIGNALS, votes):
            if count and self.signal is None:
                self.signal = number

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if not self.shared:
            self.signal = self.received
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
