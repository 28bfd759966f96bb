"""Runs ``gradfast train`` on several processes, forked from one that has imported all: torchrun takes far longer."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed

LIMIT = 120.0  # seconds for a run, on a machine that is busy with other things


@dataclass
class Ended:
    """What came of a run: each rank's exit code (minus the signal that killed it), and the text of all."""

    codes: list[int]
    out: str
    err: str


class Ranks:
    """``gradfast train`` with some arguments on `size` processes, under way until `wait`.

    They are not forked from this one: what a test before has started in it, such as threads of autograd, forbids it.

    Args:
        folder: for what they print.
        before: called in each process with its rank before anything else; it must pickle.
    """

    def __init__(
        self, size: int, command: Sequence[str], folder: Path, before: Callable[[int], Any], **environment: str
    ) -> None:
        self.out, self.err = folder / f"out-{time.monotonic_ns()}", folder / f"err-{time.monotonic_ns()}"
        # What torchrun's agent keeps: where the processes find one another, beyond the end of any of them.
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torchvision", "gradfast.train.run"])
        self.processes = [
            context.Process(target=_run, args=(rank, list(command), self.out, self.err, before, environment))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> Ended:
        """Raises:
        TimeoutError: they did not all end in time; none is left behind.
        """
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        texts = [path.read_text() if path.exists() else "" for path in (self.out, self.err)]
        if late:
            raise TimeoutError(f"{len(late)} processes did not end; {''.join(texts)}")
        return Ended([process.exitcode or 0 for process in self.processes], *texts)


def _run(
    rank: int,
    command: list[str],
    out: Path,
    err: Path,
    before: Callable[[int], Any],
    environment: dict[str, str],
) -> None:
    code = 1
    try:
        for path, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        before(rank)
        from gradfast.cli import main

        code = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
