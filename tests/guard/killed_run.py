"""A guarded run that is killed, for a process of its own: `python killed_run.py FOLDER STEP`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from guard.runs import Batch, Run
from torch import Tensor

import gradfast
from gradfast import clip
from gradfast.guard import Guard, LossWatch, SnapshotRing

BATCHES = 200
POISONED = range(130, 160)
CHECKPOINT_EVERY = 32  # steps


class Resumable:
    """A run that checkpoints, and whose snapshots lie in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(dict.fromkeys(POISONED, "poison"), batches=BATCHES, clip=clip.ZClip(warmup=10))
        self.ring = SnapshotRing(every=20, keep=3, folder=folder / "ring")
        self.guard = Guard(
            self.run.optimizer,
            model=self.run.model,
            snapshots=self.ring,
            loss_watch=LossWatch(patience=5, window=64),
            max_rollbacks=10,
        )
        self.checkpoint = folder / "checkpoint.pt"
        self.done = 0  # batches

    def resume(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.run.model.load_state_dict(saved["model"])
        self.run.optimizer.load_state_dict(saved["optimizer"])
        self.guard.load_state_dict(saved["guard"])
        self.done = saved["done"]

    def train(self, kill_at: int | None = None) -> list[Tensor]:
        for batch in self._batches():
            if self.done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.done % CHECKPOINT_EVERY == 0:
                guard = self.guard.state_dict()  # first: it may roll back
                states = {"model": self.run.model.state_dict(), "optimizer": self.run.optimizer.state_dict()}
                torch.save({**states, "guard": guard, "done": self.done}, self.checkpoint)
            loss = self.run.backward(batch)
            self.guard.step(loss)
            self.done += 1
        return [parameter.detach() for parameter in self.run.model.parameters()]

    def _batches(self) -> Iterator[Batch]:
        return islice(self.run.batches(), self.done, None)


def main(folder: str, step: str) -> None:
    run = Resumable(Path(folder))
    if step.startswith("writing"):  # killed in the middle of a snapshot's file
        save, number = torch.save, int(step.removeprefix("writing"))

        def half_saved(states: object, file: object) -> None:
            save(states, file)
            if run.guard.steps == number and "ring" in str(getattr(file, "name", "")):
                file.truncate(1000)  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half_saved  # type: ignore[assignment]
        run.train()
    run.train(int(step))


if __name__ == "__main__":
    assert gradfast.__version__
    main(*sys.argv[1:])
