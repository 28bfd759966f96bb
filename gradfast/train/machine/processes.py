"""The processes of one run, as ``torchrun`` starts them: who they are, what they tell one another, and how they end.

The rest of the trainer sees a `World`. Of one process it costs nothing: every exchange gives back what went in. Of
several, small numbers and objects go over gloo between the CPUs, whatever the device, so that no exchange waits for a
GPU, and a process that has died is noticed at the next one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from gradfast.errors import ReportedError, UserError
from gradfast.extras import first_line
from gradfast.train.interrupt import StopRequest
from gradfast.train.parse import positive

Value = TypeVar("Value")

TIMEOUT_VARIABLE = "GRADFAST_TIMEOUT"
TIMEOUT = 600.0  # seconds that processes wait for one another
LEAVE = 0.1  # seconds, at the end

_FAILURE, _PRINTED = "gradfast/failure", "gradfast/printed"


class World:
    """One process on its own.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        local_rank, local_size: the same among the processes of this machine.
        stop: what signals set; each `total` lets the processes agree on it.
        saved: says where the last checkpoint is, for the message of a run that loses a process.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    saved: Callable[[], str] | None = None

    def __init__(self) -> None:
        self.stop = StopRequest(shared=self.size > 1)

    @property
    def is_main(self) -> bool:
        """Whether this process writes, draws and prints."""
        return self.rank == 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of a few numbers over all processes, as doubles; each gives equally many."""
        return list(numbers)

    def stopped(self) -> bool:
        """Whether the run is to stop, asked by all processes at the same point."""
        self.total([])
        return bool(self.stop)

    def add_up(self, tensor: Tensor) -> Tensor:
        """`tensor`, on its device, holding its sum over all processes; nothing waits for a GPU."""
        return tensor

    def from_main(self, value: Value) -> Value:
        """What the main process calls this with, on all of them; it travels as a pickle."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """What each process calls this with, in their order, on all of them."""
        return [value]

    def part(self, count: int) -> range:
        """The share of this process in `count` things in a row: parts follow one another and differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


class Processes(World):
    """One process among those of a ``torchrun``; the process group is there until `close`.

    Raises:
        UserError: the processes did not find one another.
    """

    def __init__(self) -> None:
        environment = os.environ
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.local_rank = int(environment.get("LOCAL_RANK", self.rank))
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", self.size))
        super().__init__()
        self.timeout = timedelta(seconds=read_timeout())
        with_gpu = torch.cuda.is_available() and distributed.is_nccl_available()
        if with_gpu and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if with_gpu else "gloo", timeout=self.timeout)
            self._store = distributed.distributed_c10d._get_default_store()
            self._group: Any = distributed.new_group(backend="gloo", timeout=self.timeout)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {self.rank} of {self.size} cannot reach the others ({first_line(error)}); start all of them "
                "with torchrun, and let --rdzv-endpoint be one address that every machine reaches"
            ) from error
        if not self.is_main:
            logging.getLogger("gradfast").setLevel(logging.CRITICAL)  # the main process says the same

    def total(self, numbers: Sequence[float]) -> list[float]:
        votes = self.stop.votes()
        sums = torch.tensor([*votes, *numbers], dtype=torch.float64)
        distributed.all_reduce(sums, group=self._group)
        answers: list[float] = sums.tolist()
        self.stop.agree(answers[: len(votes)])
        return answers[len(votes) :]

    def add_up(self, tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor)
        return tensor

    def from_main(self, value: Value) -> Value:
        box = [value if self.is_main else None]
        distributed.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    # ---------------------------------------------------------------- the end

    def give_up(self, error: BaseException) -> BaseException:
        """What this process ends with when `error` ended it.

        The first to fail leaves its message where all find it, and lets go of the others: their next exchange fails,
        which is how they learn of it. The message is printed once, by whoever comes first.
        """
        lost = is_lost_process(error)
        if lost:
            message = f"a process of this run has ended or does not answer ({lost_how(error)})"
            if self.saved is not None:
                message += f"; {self.saved()}"
        elif isinstance(error, UserError):
            message = str(error)
        else:
            message = f"process {self.rank} failed: {type(error).__name__}: {first_line(error)}"
        try:
            message = self._store.compare_set(_FAILURE, "", message).decode()
            first = self._store.add(_PRINTED, 1) == 1
        except RuntimeError:  # whoever kept the store is gone as well
            first = True
        self.close()
        if not lost and not isinstance(error, UserError):
            return error  # with its traceback
        return UserError(message) if first else ReportedError(message)

    def close(self) -> None:
        """Take leave, and give gloo's threads a moment to let go of the tensors of the last exchange.

        They need the interpreter for that: a thread that has not done so when Python ends aborts the process, and
        torchrun calls a run that was complete a failure (seen with torch 2.14, also without gradfast).
        """
        if distributed.is_initialized():
            with contextlib.suppress(RuntimeError):
                distributed.destroy_process_group()
            time.sleep(LEAVE)


def read_timeout() -> float:
    """Seconds that processes wait for one another.

    Raises:
        UserError: the environment has something else there.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        return positive(text)
    except ValueError as error:
        raise UserError(f"{TIMEOUT_VARIABLE}, the seconds that processes wait for one another: {error}") from None


def is_lost_process(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone, or silent."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))
    )


def lost_how(error: BaseException) -> str:
    """The telling words of what gloo or NCCL says, which begins with a path of its source."""
    text = first_line(error)
    if text.startswith("["):
        text = text.partition("] ")[2]
    return text.split(". ")[0]


def started_by_torchrun() -> bool:
    """Whether this process is one of several, or of one that ``torchrun`` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def open_world() -> Iterator[World]:
    """The processes of this run, of which one that fails ends all."""
    if not started_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield World()
        return
    world = Processes()
    try:
        yield world
        world.total([0.0])  # nobody leaves while another still waits for its last word
    except BaseException as error:
        ending = world.give_up(error)
        if ending is error:
            raise
        raise ending from error
    finally:
        world.close()
