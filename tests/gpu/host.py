"""What a step asks of a GPU's host at most: one launch, no waiting, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradfast.bench.launches import launches_of
from gradfast.bench.memory import peak_extra_bytes


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Has torch raise where its host waits for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_one_launch_and_no_waiting(optimizer: torch.optim.Optimizer) -> None:
    """From the first step on, which makes the states."""
    with no_synchronisation():
        for _ in range(3):
            optimizer.step()
    assert len(launches_of(optimizer.step)) == 1
    assert peak_extra_bytes(torch.device("cuda"), optimizer.step) == 0
