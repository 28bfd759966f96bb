"""What `make gpu-check` is to show of speed on an H100, judged from the benchmark's report.

For another GPU the same lines are printed; they say what it reached, not that it should have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What the targets are about, in the order in which it is measured while there is time.
WORKLOADS = ("resnet50", "gpt2-124m", "2000x512", "llama-1b")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One bound, and what was found of it."""

    what: str
    bound: str
    found: float | None  # None: not measured
    shown: str
    verdict: str  # met, missed, not measured


def ratio(result: Result) -> float:
    return result["ratio"]["median"]


def bandwidth(result: Result) -> float:
    return result["fraction_of_memory"]  # on CUDA that of a copy


def host(result: Result) -> float:
    return result["gradfast"]["host_seconds"] * 1e6


def launches(result: Result) -> float:
    return result["gradfast"]["launches"]


# (what, of gradfast's results beside this peer, what is read of one, its bound, and whether that is the least)
Row = tuple[str, str, str, Callable[[Result], float], float, bool, str]

ROWS: Sequence[Row] = (
    ("resnet50", "torch-fused", "device time over clip + fused", ratio, 0.55, False, ".2f"),
    ("resnet50", "torch-unclipped", "device time over fused without clipping", ratio, 1.0, False, ".2f"),
    ("gpt2-124m", "torch-fused", "bytes' floor over time, of the copy bandwidth", bandwidth, 0.85, True, ".0%"),
    ("llama-1b", "torch-fused", "bytes' floor over time, of the copy bandwidth", bandwidth, 0.85, True, ".0%"),
    ("resnet50", "torch-fused", "host microseconds of a step, 161 tensors", host, 20.0, False, ".1f"),
    ("resnet50", "torch-fused", "launches of a step, 161 tensors", launches, 2, False, ".0f"),
    ("2000x512", "torch-fused", "launches of a step, 2000 tensors", launches, 2, False, ".0f"),
)


def judge(report: Mapping[str, Any] | None) -> list[Target]:
    """Hold a bench.json (None: there is none) against every bound, for SGD and AdamW in fp32."""
    results = [] if report is None else report["results"]
    return [_judge(row, optimizer, results) for row in ROWS for optimizer in ("SGD", "AdamW")]


def _judge(row: Row, optimizer: str, results: Sequence[Result]) -> Target:
    workload, peer, what, read, bound, is_least, digits = row
    wanted = {"workload": workload, "peer": peer, "optimizer": optimizer, "dtype": "fp32"}
    shown_bound = f"{'at least' if is_least else 'at most'} {bound:{digits}}"
    title = f"{workload} {optimizer}: {what}"
    for result in results:
        if all(result[key] == value for key, value in wanted.items()) and read(result) is not None:
            found = read(result)
            met = found >= bound if is_least else found <= bound
            return Target(title, shown_bound, found, f"{found:{digits}}", "met" if met else "missed")
    return Target(title, shown_bound, None, "", "not measured")
