"""One process of the benchmark: every comparison of the settings, checked and timed.

    python -m gradfast.bench.measure RESULTS.json < SETTINGS.json

writes a list of comparisons, each with the samples of all its pairs, and a list of what was left out and why. It writes
them after each comparison, so that a process that dies leaves what it had.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gradfast.bench.contenders import PEERS, Build, Contender, Peer, Unavailable, build_gradfast
from gradfast.bench.launches import launches_of
from gradfast.bench.memory import peak_extra_bytes
from gradfast.bench.noise import Noise
from gradfast.bench.same_update import STEPS, Problem, WrongUpdate, check
from gradfast.bench.settings import Settings
from gradfast.bench.timing import (
    Clock,
    copy_bandwidth,
    host_seconds,
    interleave,
    make_clock,
    memory_bandwidth,
    middle,
)
from gradfast.bench.traffic import floor_bytes
from gradfast.bench.workloads import DTYPES, WORKLOADS, Workload
from gradfast.extras import first_line
from gradfast.files import atomic_write


class Process:
    """Holds what all comparisons of one process share."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings, self.path = settings, path
        self.device = torch.device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.deadline = time.monotonic() + (math.inf if settings.limit is None else settings.limit)
        self.clock: Clock = make_clock(self.device, settings.flush)
        self.noise = Noise(self.device)
        self.copy_bytes_per_second: list[float] = []
        self.results: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []

    def run(self) -> None:
        """Measure everything; a comparison that cannot be made is left out with its reason."""
        self._measure_copy()
        for workload in (WORKLOADS[name] for name in self.settings.workloads):
            for dtype in self.settings.dtypes:
                for optimizer in self.settings.optimizers:
                    self._compare_all(workload, dtype, optimizer)
        self._measure_copy()

    def _measure_copy(self) -> None:
        self.copy_bytes_per_second.append(copy_bandwidth(self.device))
        self._write()

    def _write(self) -> None:
        found = {
            "copy_bytes_per_second": self.copy_bytes_per_second,
            "results": self.results,
            "left_out": self.left_out,
        }
        with atomic_write(self.path) as file:
            file.write(json.dumps(found).encode())

    def _compare_all(self, workload: Workload, dtype: str, optimizer: str) -> None:
        case = {"workload": workload.name, "dtype": dtype, "optimizer": optimizer}
        problem = Problem(workload.shapes, DTYPES[dtype], self.device, optimizer, self.noise)
        with self._noting({**case, "peer": "all"}):
            self._check_time()
            true_norms = [problem.true_norm(step) for step in range(STEPS)]
            ours = build_gradfast(problem.parameters(), optimizer, problem.max_norm)
            our_norm_error = check(problem, ours, true_norms)
            if not our_norm_error <= 1e-6:
                raise WrongUpdate(f"gradfast's norm is off by {our_norm_error:.1e}")
            for peer in (PEERS[name] for name in self.settings.peers):
                with self._noting({**case, "peer": peer.name}):
                    result = self._compare(problem, ours, peer, dtype, true_norms)
                    self.results.append({**case, "peer": peer.name, **result})
                self._free()
            del ours
        self._free()

    def _compare(
        self, problem: Problem, ours: Contender, peer: Peer, dtype: str, true_norms: list[float]
    ) -> dict[str, Any]:
        self._check_time()
        if problem.optimizer not in peer.optimizers:
            raise Unavailable(f"has no {problem.optimizer}")
        if self.device.type not in peer.devices:
            raise Unavailable(f"runs on {' and '.join(peer.devices)} only")
        if dtype not in peer.dtypes:
            raise Unavailable(f"does not take {dtype}")
        theirs = peer.build(problem.parameters(), problem.optimizer, problem.max_norm)
        norm_error = check(problem, theirs, true_norms)
        bandwidth = [memory_bandwidth(self.device)]
        pairs = interleave(self.clock, ours.step, theirs.step, self.settings.pairs, self.settings.seconds)
        bandwidth.append(memory_bandwidth(self.device))  # it may have become another in between
        elements = sum(parameter.numel() for parameter in theirs.parameters)
        return {
            "tensors": len(theirs.parameters),
            "elements": elements,
            "clips": theirs.clips,
            "floor_bytes": floor_bytes(problem.optimizer, problem.dtype.itemsize, elements),
            "ratios": [pair.ratio for pair in pairs],
            "memory_bytes_per_second": middle(bandwidth),
            "host_hidden": all(sample.host_hidden for pair in pairs for sample in pair),
            "norm_error": norm_error,
            "gradfast": self._figures(problem, ours, build_gradfast, [pair.ours.device for pair in pairs]),
            "other": self._figures(problem, theirs, peer.build, [pair.peer.device for pair in pairs]),
        }

    def _figures(self, problem: Problem, contender: Contender, build: Build, seconds: list[float]) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "seconds": middle(seconds),
            "host_seconds": self._host_seconds(problem, build),
            # None launched is none seen: the profiler may lack what it needs of the driver.
            "launches": (len(launches_of(contender.step)) or None) if cuda else None,
            "peak_extra_bytes": peak_extra_bytes(self.device, contender.step),
        }

    def _host_seconds(self, problem: Problem, build: Build) -> float:
        """Of the whole Python step, over as many tensors of one element: the device has next to nothing to do."""
        tiny = Problem([(1,)] * len(problem.shapes), problem.dtype, self.device, problem.optimizer, self.noise)
        twin = build(tiny.parameters(), tiny.optimizer, tiny.max_norm)
        return middle(host_seconds(twin.step, seconds=min(0.5, self.settings.seconds)))

    @contextmanager
    def _noting(self, case: dict[str, str]) -> Iterator[None]:
        """Say what is being measured; note why it could not be, and go on."""
        print("  ", *case.values(), file=sys.stderr, flush=True)
        try:
            yield
        except Unavailable as reason:
            self.left_out.append({**case, "kind": "unavailable", "why": str(reason)})
        except WrongUpdate as reason:
            self.left_out.append({**case, "kind": "wrong", "why": str(reason)})
        except torch.OutOfMemoryError as error:
            self.left_out.append({**case, "kind": "unavailable", "why": first_line(error)})
        except Exception as error:  # whatever a peer raises, the other results are kept
            self.left_out.append({**case, "kind": "failed", "why": f"{type(error).__name__}: {first_line(error)}"})
        self._write()

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise Unavailable("the time limit was reached")

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    Process(Settings.from_json(json.load(sys.stdin)), Path(sys.argv[1])).run()


if __name__ == "__main__":
    main()
