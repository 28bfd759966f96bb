"""Numbers on their way from the device: copied when the device gets to it, read when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Transfer:
    """A queue of small tensors, each with what is to be done with its numbers.

    On CUDA a tensor is copied to pinned memory without waiting, and an event tells when it is there. On the CPU it is
    read at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Tensor, Callable[[list[float]], None]]] = deque()

    def send(self, values: Tensor, then: Callable[[list[float]], None]) -> None:
        if values.device.type != "cuda":
            self._waiting.append((None, values, then))
            self.receive()
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        self._waiting.append((event, host, then))

    def receive(self, wait: bool = False) -> None:
        """Hand on what has arrived, in order; all of it, if that is worth waiting for."""
        while self._waiting:
            event, host, then = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._waiting.popleft()
            then(host.tolist())
