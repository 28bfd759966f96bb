"""Runs a test on several ranks: `@on_ranks(2, 4)` above an ordinary function, which every rank then calls.

Starting a process and importing torch takes seconds, so one crew of processes serves the whole session. Each test gets
its own process group (gloo, on the CPU), of as many ranks as it asks for. A rank that does not answer in time ends the
crew, fails the test, and the next one starts another.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

CREW = 4
TIMEOUT = 120  # seconds for one test, on a machine that may be busy with other things


def on_ranks(*worlds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a test that runs it on every rank of a process group, for each of the sizes `worlds`.

    What the function takes are pytest's parameters; they must pickle. It fails if it raises on any rank.
    """

    def decorate(case: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("world", worlds)
        @functools.wraps(case)
        def test(crew: Crew, world: int, **arguments: Any) -> None:
            crew.run(inspect.getfile(case), case.__name__, world, arguments)

        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("crew", "world")]
        test.__signature__ = inspect.Signature([*own, *_keyword_only(case)])  # type: ignore[attr-defined]
        return test

    return decorate


def _keyword_only(case: Callable[..., None]) -> list[inspect.Parameter]:
    parameters = inspect.signature(case).parameters.values()
    return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]


class Crew:
    """The processes, started when the first test needs them."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, file: str, name: str, world: int, arguments: dict[str, Any]) -> None:
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self._pipes[rank].send((file, name, rank, world, arguments, folder))
            answers = self._answers(world)
        failed = {rank: answer for rank, answer in answers.items() if answer}
        if failed or len(answers) < world:
            self.stop()  # a rank that raised may have left others waiting for it
        silent = [f"rank {rank} did not answer in time" for rank in range(world) if rank not in answers]
        if failed or silent:
            pytest.fail(
                "\n".join([*silent, *(f"rank {rank}:\n{text}" for rank, text in failed.items())]), pytrace=False
            )

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "gradfast"])
        for _ in range(CREW):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(here)

    def _answers(self, world: int) -> dict[int, str]:
        """Return each rank's traceback, or "": all of them, or those that came before one failed or time was up."""
        answers: dict[int, str] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < world:
            waiting = {self._pipes[rank]: rank for rank in range(world) if rank not in answers}
            # After a failure the others are given a moment, so that a test which fails everywhere shows it.
            patience = 3.0 if any(answers.values()) else deadline - time.monotonic()
            ready = wait(list(waiting), timeout=max(0.0, patience))
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pipe.recv()
                except EOFError:
                    answers[waiting[pipe]] = "the process ended"
        return answers


def _serve(pipe: Connection) -> None:
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            file, name, rank, world, arguments, folder = pipe.recv()
        except EOFError:
            return
        pipe.send(_run_case(file, name, rank, world, arguments, folder))


def _run_case(file: str, name: str, rank: int, world: int, arguments: dict[str, Any], folder: str) -> str:
    import torch
    from torch import distributed

    try:
        case = getattr(_module(file), name).__wrapped__
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        os.environ["GRADFAST_TEST_FOLDER"] = folder
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own use of gloo
            case(**arguments)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        return traceback.format_exc()
    return ""


@functools.cache
def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared_folder() -> Path:
    """A folder that all ranks of the test see, gone when it ends."""
    return Path(os.environ["GRADFAST_TEST_FOLDER"])
