"""A ring of recent snapshots of a run, in memory or on disk."""

from __future__ import annotations

import copy
import logging
import re
import secrets
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gradfast.files import atomic_write

_log = logging.getLogger("gradfast")

_NAME = re.compile(r"snapshot-(\d+)-([0-9a-f]+)\.pt")


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

    def load(self, mmap: bool = False) -> dict[str, Any]:
        if self.states is not None:
            return self.states
        assert self.path is not None
        return torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)


class SnapshotRing:
    """The last `keep` snapshots of a run, one every `every` steps.

    In memory they lie on the CPU, `keep` times the size of a checkpoint; with a folder on disk, each file whole or not
    there at all, and a run that is resumed goes on with those that are there.

    Args:
        every: steps between two snapshots.
        keep: how many are kept; the oldest goes first.
        folder: where to write them; None for memory. Made if it is not there. Files in it that are not this run's are
            left alone.
    """

    def __init__(self, every: int = 100, keep: int = 3, folder: str | Path | None = None) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"Invalid SnapshotRing: every={every} and keep={keep} must be at least 1")
        self.every, self.keep = every, keep
        self.folder = None if folder is None else Path(folder)
        self.ring: deque[Snapshot] = deque()
        self.run = secrets.token_hex(4)  # in the files' names: what another run left is never taken for this one's

    def __len__(self) -> int:
        return len(self.ring)

    def take(self, step: int, parts: dict[str, Stateful]) -> None:
        """Add a snapshot of every part. Waits for the device.

        Raises:
            gradfast.errors.UserError: the file could not be written; those from before are still there.
        """
        states = {name: _copied(part.state_dict()) for name, part in parts.items()}
        if self.ring and self.ring[-1].step == step:
            self.ring.pop()  # the same once more, of a run that is resumed there
        if self.folder is None:
            self.ring.append(Snapshot(step, states, None))
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"snapshot-{step:09d}-{self.run}.pt"
            with atomic_write(path) as file:
                torch.save(states, file)
            self.ring.append(Snapshot(step, None, path))
        while len(self.ring) > self.keep:
            self._drop(self.ring.popleft())

    def newest(self) -> tuple[Snapshot, dict[str, Any]] | None:
        """The newest snapshot that can be read, and its states; None if there is none. Unreadable ones are dropped."""
        while self.ring:
            snapshot = self.ring[-1]
            try:
                return snapshot, snapshot.load()
            except Exception as error:  # there is nothing that torch.load does not raise for broken bytes
                _log.warning("the snapshot of step %d cannot be read, and is left out: %s", snapshot.step, error)
                self._drop(self.ring.pop())
        return None

    def restore(self, parts: dict[str, Stateful]) -> int:
        """Bring every part back to the newest snapshot, which leaves the ring; return its step.

        Then a second roll-back without a snapshot in between reaches further back; but the last one stays.

        Raises:
            LookupError: there is no snapshot that can be read.
        """
        found = self.newest()
        if found is None:
            raise LookupError("there is no snapshot that can be read")
        snapshot, states = found
        for name, part in parts.items():
            part.load_state_dict(_copied(states[name]))
        if len(self.ring) > 1:
            self._drop(self.ring.pop())
        return snapshot.step

    # ---------------------------------------------------------------- a run that is resumed

    def adopt(self, run: str | None, step: int, parts: Collection[str]) -> None:
        """Go on with the snapshots that an earlier process of a run left in the folder.

        Those from after the step that the run is resumed at are removed, for what they hold is going to happen anew; so
        are files that an earlier process had half-written, and snapshots that cannot be read or do not hold all parts.

        Args:
            run: what the run's snapshots have in their names, from its checkpoint; None if that does not say.
            step: that the run is resumed at.
            parts: names of what a roll-back will ask for.
        """
        self.ring.clear()
        self.run = run or self.run
        if self.folder is None or not self.folder.is_dir():
            return
        for half_written in self.folder.glob(f".snapshot-*-{self.run}.pt.*.tmp"):
            half_written.unlink(missing_ok=True)
        found, others = [], 0
        for path in self.folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            if name[2] == self.run:
                found.append(Snapshot(int(name[1]), None, path))
            else:
                others += 1
        for snapshot in sorted(found, key=lambda each: each.step):
            wrong = _fault(snapshot, step, parts)
            if wrong:
                _log.warning("removed %s: %s", snapshot.path, wrong)
                self._drop(snapshot)
            else:
                self.ring.append(snapshot)
        while len(self.ring) > self.keep:
            self._drop(self.ring.popleft())
        if others:
            _log.warning("%s holds %d snapshots of other runs, which are left alone", self.folder, others)

    def keep_only(self, steps: Collection[int]) -> None:
        """Drop the snapshots of other steps than these."""
        for snapshot in list(self.ring):
            if snapshot.step not in steps:
                self.ring.remove(snapshot)
                self._drop(snapshot)

    @staticmethod
    def _drop(snapshot: Snapshot) -> None:
        if snapshot.path is not None:
            snapshot.path.unlink(missing_ok=True)


def _fault(snapshot: Snapshot, step: int, parts: Collection[str]) -> str:
    """Why a run that is resumed at a step cannot use a snapshot; "" if it can."""
    if snapshot.step > step:
        return f"it is from after step {step}, where the run is resumed"
    try:
        missing = sorted(set(parts) - snapshot.load(mmap=True).keys())  # tensors are not read before they are wanted
    except Exception as error:  # see newest
        return f"it cannot be read: {error}"
    return f"it does not hold {', '.join(missing)}" if missing else ""


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
