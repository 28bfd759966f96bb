"""A ring of recent snapshots of a run, in memory or on disk."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gradfast.files import atomic_write


class Stateful(Protocol):
    """Anything with torch's pair of methods: models, optimisers, schedulers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class Snapshot:
    """The state of everything after a step, in memory or in a file."""

    step: int
    states: dict[str, Any] | None
    path: Path | None

    def load(self) -> dict[str, Any]:
        if self.states is not None:
            return self.states
        assert self.path is not None
        return torch.load(self.path, map_location="cpu", weights_only=True)


class SnapshotRing:
    """The last `keep` snapshots of a run, one every `every` steps.

    In memory they lie on the CPU, `keep` times the size of a checkpoint; with a folder on disk, each file whole or not
    there at all.

    Args:
        every: steps between two snapshots.
        keep: how many are kept; the oldest goes first.
        folder: where to write them; None for memory. Made if it is not there.
    """

    def __init__(self, every: int = 100, keep: int = 3, folder: str | Path | None = None) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"Invalid SnapshotRing: every={every} and keep={keep} must be at least 1")
        self.every, self.keep = every, keep
        self.folder = None if folder is None else Path(folder)
        self.ring: deque[Snapshot] = deque()

    def __len__(self) -> int:
        return len(self.ring)

    def take(self, step: int, parts: dict[str, Stateful]) -> None:
        """Add a snapshot of every part. Waits for the device.

        Raises:
            gradfast.errors.UserError: the file could not be written; those from before are still there.
        """
        states = {name: _copied(part.state_dict()) for name, part in parts.items()}
        if self.folder is None:
            self.ring.append(Snapshot(step, states, None))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"snapshot-{step:09d}.pt"
            with atomic_write(path) as file:
                torch.save(states, file)
            self.ring.append(Snapshot(step, None, path))
        while len(self.ring) > self.keep:
            self._drop(self.ring.popleft())

    def restore(self, parts: dict[str, Stateful]) -> int:
        """Bring every part back to the newest snapshot, which leaves the ring; return its step.

        Then a second roll-back without a snapshot in between reaches further back; but the last one stays.
        """
        snapshot = self.ring[-1]
        states = snapshot.load()
        for name, part in parts.items():
            part.load_state_dict(_copied(states[name]))
        if len(self.ring) > 1:
            self._drop(self.ring.pop())
        return snapshot.step

    @staticmethod
    def _drop(snapshot: Snapshot) -> None:
        if snapshot.path is not None:
            snapshot.path.unlink(missing_ok=True)


def _copied(value: Any) -> Any:
    """Copy a state with all its tensors to the CPU: training goes on to write the originals."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # of the same type: a module's OrderedDict, a scheduler's Counter
        result.update((key, _copied(each)) for key, each in value.items())
        return result
    if type(value) in (list, tuple):
        return type(value)(_copied(each) for each in value)
    return copy.deepcopy(value)
