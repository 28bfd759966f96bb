"""From the samples of several processes to one line of the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gradfast.bench.timing import middle


def summarise_ratios(processes: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """Join the ratios of all pairs of all processes.

    Args:
        processes: for each process, time of gradfast over time of the peer, a pair each.

    Returns:
        `median`: the median of the processes' medians, so that each process weighs the same. `low` and `high`: the
        middle half of all pairs, that is their quartiles. `process_low` and `process_high`: the least and the greatest
        of the processes' medians, which tell what another run may give.
    """
    medians = [middle(ratios) for ratios in processes]
    pairs = [ratio for ratios in processes for ratio in ratios]
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else (pairs * 3)
    return {
        "median": middle(medians),
        "low": low,
        "high": high,
        "process_low": min(medians),
        "process_high": max(medians),
        "processes": len(processes),
        "pairs": len(pairs),
    }


CASE = ("workload", "dtype", "optimizer", "peer")


def summarise(processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join what `measure` wrote in each process: the copy bandwidth, a result a comparison, and what was left out."""
    copies = [value for process in processes for value in process["copy_bytes_per_second"]]
    grouped: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for process in processes:
        for result in process["results"]:
            grouped.setdefault(tuple(result[key] for key in CASE), []).append(result)
    left_out = {tuple(case.items()): case for process in processes for case in process["left_out"]}
    return {
        "copy_bytes_per_second": middle(copies),
        "results": [_join(same) for same in grouped.values()],
        "left_out": list(left_out.values()),
    }


def _join(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = same[0]
    kept = {key: first[key] for key in (*CASE, "tensors", "elements", "clips", "floor_bytes")}
    joined = {who: _figures([result[who] for result in same]) for who in ("gradfast", "other")}
    rates = [result["floor_bytes"] / result["gradfast"]["seconds"] for result in same]
    memory = [result["memory_bytes_per_second"] for result in same]
    return {
        **kept,
        "ratio": summarise_ratios([result["ratios"] for result in same]),
        "floor_bytes_per_second": middle(rates),
        "memory_bytes_per_second": middle(memory),
        "fraction_of_memory": middle([rate / possible for rate, possible in zip(rates, memory, strict=True)]),
        "norm_error": max(result["norm_error"] for result in same),
        "host_hidden": all(result["host_hidden"] for result in same),
        **joined,
    }


def _figures(same: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of the times; the most of launches and memory, which should not vary at all."""
    launches = [figures["launches"] for figures in same if figures["launches"] is not None]
    return {
        "seconds": middle([figures["seconds"] for figures in same]),
        "host_seconds": middle([figures["host_seconds"] for figures in same]),
        "launches": max(launches, default=None),
        "peak_extra_bytes": max(figures["peak_extra_bytes"] for figures in same),
    }
