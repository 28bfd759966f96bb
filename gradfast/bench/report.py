"""The benchmark's report: one JSON object, and one Markdown table made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SCHEMA = 2

COLUMNS = {
    "workload": "what is stepped",
    "dtype": "of parameters, gradients and state",
    "optimiser": "all with clipping to the same norm",
    "peer": "what gradfast is compared with",
    "ratio": "time of gradfast over the peer's, below 1 gradfast is faster: median, and the middle half of all pairs",
    "processes": "least and greatest median of a process",
    "ms": "a step of gradfast, and of the peer",
    "GB/s": "the bytes that a step must move over gradfast's time, and the bandwidth of the memory at that moment",
    "launches": "CUDA kernels a step, gradfast and the peer",
    "host µs": "of the whole Python step on as many tensors of one element, gradfast and the peer",
    "extra MB": "allocated by the step at its peak, gradfast and the peer",
}


def make_report(environment: dict[str, Any], settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "environment": environment, "settings": settings, **summary}


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: where it was measured, the table, and what was left out."""
    lines = [heading(report), "", row(COLUMNS), row(["---"] * len(COLUMNS))]
    lines += [row(cells(result)) for result in report["results"]]
    lines += ["", *notes(report)]
    return "\n".join(lines) + "\n"


def heading(report: dict[str, Any]) -> str:
    environment, settings = report["environment"], report["settings"]
    where = environment["device_name"]
    if environment["device"] == "cpu":
        threads = settings["threads"] or environment["threads"]
        where += f", {threads} thread{'' if threads == 1 else 's'}, {environment['cpu_capability']}"
    caches = "caches flushed before each step" if settings["flush"] else "caches as the last step left them"
    return (
        f"{where}; torch {environment['torch']}, gradfast {environment['gradfast']}; copy bandwidth "
        f"{report['copy_bytes_per_second'] / 1e9:.1f} GB/s; {settings['processes']} "
        f"{'process' if settings['processes'] == 1 else 'processes'}, {caches}."
    )


def row(values: Sequence[str] | dict[str, str]) -> str:
    return "| " + " | ".join(values) + " |"


def cells(result: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of COLUMNS."""
    ratio, ours, other = result["ratio"], result["gradfast"], result["other"]
    peer = result["peer"] if result["clips"] else f"{result['peer']} (no clipping)"
    seen = ["?" if figures["launches"] is None else str(figures["launches"]) for figures in (ours, other)]
    launches = "" if seen == ["?", "?"] else " / ".join(seen)
    return [
        result["workload"],
        result["dtype"],
        result["optimizer"],
        peer,
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"{ratio['process_low']:.2f} to {ratio['process_high']:.2f}",
        f"{digits(ours['seconds'] * 1e3)} / {digits(other['seconds'] * 1e3)}",
        f"{digits(result['floor_bytes_per_second'] / 1e9)} ({result['fraction_of_memory']:.0%} of "
        f"{digits(result['memory_bytes_per_second'] / 1e9)})",
        launches,
        f"{digits(ours['host_seconds'] * 1e6)} / {digits(other['host_seconds'] * 1e6)}",
        f"{digits(ours['peak_extra_bytes'] / 1e6)} / {digits(other['peak_extra_bytes'] / 1e6)}",
    ]


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else f"{float(text):.6f}".rstrip("0").rstrip(".")


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the table must know beside it."""
    lines = []
    inexact = {}
    for result in report["results"]:
        if result["norm_error"] > 1e-4:
            inexact[f"{result['workload']} {result['dtype']}"] = result["norm_error"]
        if not result["host_hidden"]:
            case = f"{result['workload']} {result['dtype']} {result['optimizer']} {result['peer']}"
            lines.append(f"- {case}: the launches outran the queue, so that host time is in the device time.")
    for case, error in inexact.items():
        lines.append(f"- {case}: the norm that torch clips by is off by {error:.1e} of its value; gradfast's is not.")
    for case in report["left_out"]:
        name = " ".join(case[key] for key in ("workload", "dtype", "optimizer", "peer"))
        verb = {"unavailable": "left out", "wrong": "REFUSED, a wrong update", "failed": "FAILED"}[case["kind"]]
        lines.append(f"- {name}: {verb}: {case['why']}.")
    return lines


def print_table(report: dict[str, Any]) -> None:
    """Print the report: drawn by rich on a terminal that has it, else as Markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(report))
        return
    console = Console()
    if not console.is_terminal:
        print(markdown(report))
        return
    table = Table(title=heading(report), title_justify="left")
    for name in COLUMNS:
        table.add_column(name)
    for result in report["results"]:
        table.add_row(*cells(result))
    console.print(table)
    for line in notes(report):
        console.print(line, markup=False, highlight=False)
