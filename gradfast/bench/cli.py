"""The command line of ``gradfast bench``, and the processes that it starts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradfast._load import native
from gradfast.arguments import CommandParser
from gradfast.bench.chart import draw_chart
from gradfast.bench.contenders import OPTIMIZERS, PEERS
from gradfast.bench.environment import describe
from gradfast.bench.report import COLUMNS, make_report, markdown, print_table
from gradfast.bench.settings import Settings
from gradfast.bench.summary import summarise
from gradfast.bench.workloads import DTYPES, WORKLOADS
from gradfast.errors import UserError
from gradfast.files import atomic_write, write_failure

OUTPUT = Path("runs/bench")
TORCH_PEERS = ("torch-default", "torch-fused", "torch-scaled", "torch-unclipped")
QUICK = {
    "workload": ["resnet50", "small"],
    "peer": ["torch-fused", "torch-unclipped"],
    "pairs": 15,
    "seconds": 1.5,
    "limit": 40.0,  # on a busy machine, less is measured
}

# Seconds that a process may take for the comparison under way when its time is up.
GRACE = 30.0

# Marks in a document between which the table stands.
BEGIN, END = "<!-- begin bench.md -->", "<!-- end bench.md -->"

# The profiler that counts launches and bytes writes its own comings and goings to stderr.
QUIET_PROFILER = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

DESCRIPTION = """\
Time clip and step: gradfast against what one would write without it, on the shapes of real models.

  gradfast bench --quick                                    one process, under a minute
  gradfast bench                                            three processes, the table of docs/performance.md
  gradfast bench --workload resnet50 --dtype bf16 --optimizer AdamW

A pair is one step of each, one right after the other and in alternating order; what counts is the ratio of the two, as
absolute times drift with the machine. Before anything is timed, both do two steps that are compared with float64,
element by element: a contender that computes something else is refused, and the exit code is 1."""


def build_parser() -> CommandParser:
    listed = {
        "workload": {name: workload.about for name, workload in WORKLOADS.items()},
        "peer": {name: peer.about for name, peer in PEERS.items()},
    }
    epilog = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:<20}{about}" for name, about in entries.items() if about)
        for title, entries in (
            ("workloads", listed["workload"]),
            ("peers", listed["peer"]),
            ("columns of the table", COLUMNS),
        )
    )
    parser = CommandParser(
        prog="gradfast bench",
        description=DESCRIPTION,
        epilog=epilog,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--workload", nargs="+", metavar="NAME", help="default: all that suit the device")
    what.add_argument(
        "--dtype", nargs="+", metavar="NAME", default=["fp32"], help=f"{', '.join(DTYPES)} (default: fp32)"
    )
    what.add_argument(
        "--optimizer",
        nargs="+",
        metavar="NAME",
        default=["SGD", "AdamW"],
        help=f"{', '.join(OPTIMIZERS)} (default: SGD with momentum, AdamW)",
    )
    what.add_argument("--peer", nargs="+", metavar="NAME", help="default: torch's four, and others that are installed")
    what.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where gradfast can use it)")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--quick", action="store_true", help="resnet50 and small, two peers, one process: under a minute")
    how.add_argument("--processes", metavar="N", help="one after the other (default: 3)")
    how.add_argument("--pairs", metavar="N", help="a comparison and process, at most (default: 40)")
    how.add_argument("--seconds", metavar="S", help="a comparison and process, about (default: 8)")
    how.add_argument("--limit", metavar="S", help="of the whole run; comparisons not begun by then are left out")
    how.add_argument("--threads", metavar="N", help="of the CPU (default: torch's own)")
    how.add_argument(
        "--no-flush",
        action="store_true",
        help="leave the caches as the last step left them, instead of turning them over before each",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=OUTPUT,
        help="for bench.json, bench.md, bench.png (default: %(default)s)",
    )
    parser.add_argument(
        "--into", metavar="FILE.md", type=Path, help=f"also put the table there, between lines {BEGIN} and {END}"
    )
    return parser


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Check the flags.

    Raises:
        UserError: one is not what it must be.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() and native.cuda_built() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU")
    if device == "cuda" and not native.cuda_built():
        raise UserError("--device cuda: gradfast was built for the CPU only; gradfast info tells why")
    quick: Mapping[str, Any] = QUICK if arguments.quick else {}
    suitable = [name for name, workload in WORKLOADS.items() if device == "cuda" or not workload.cuda_only]
    workloads = names("--workload", arguments.workload or quick.get("workload", suitable), WORKLOADS)
    if unsuitable := [name for name in workloads if name not in suitable]:
        raise UserError(f"--workload {unsuitable[0]}: takes minutes a step on a CPU; it needs --device cuda")
    processes = number("--processes", arguments.processes, 1 if arguments.quick else 3, int)
    limit = number("--limit", arguments.limit, quick.get("limit"), float)
    return Settings(
        device=device,
        workloads=workloads,
        dtypes=names("--dtype", arguments.dtype, DTYPES),
        optimizers=names("--optimizer", arguments.optimizer, OPTIMIZERS),
        peers=names("--peer", arguments.peer or quick.get("peer", default_peers(device)), PEERS),
        pairs=number("--pairs", arguments.pairs, quick.get("pairs", 40), int),
        seconds=number("--seconds", arguments.seconds, quick.get("seconds", 8.0), float),
        processes=processes,
        limit=None if limit is None else limit / processes,
        flush=not arguments.no_flush,
        threads=number("--threads", arguments.threads, None, int),
    )


def default_peers(device: str) -> list[str]:
    """torch's, and each other package's that is installed and runs on the device."""
    others = {"apex": "apex", "transformer-engine": "transformer_engine", "deepspeed-cpu": "deepspeed"}
    found = [name for name, package in others.items() if importlib.util.find_spec(package) is not None]
    return [*TORCH_PEERS, *(name for name in found if device in PEERS[name].devices)]


def names(flag: str, given: Sequence[str], known: Mapping[str, object]) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            raise UserError(f"{flag}: expected some of {', '.join(known)}, got {name!r}")
    return tuple(dict.fromkeys(given))


def number(flag: str, given: str | None, default: Any, kind: Callable[[str], Any]) -> Any:
    if given is None:
        return default
    try:
        value = kind(given)
    except ValueError:
        value = 0
    if not 0 < value < 1_000_000:
        what = "a whole number of at least 1" if kind is int else "a number above 0"
        raise UserError(f"{flag}: expected {what}, got {given!r}")
    return value


def measure(settings: Settings) -> dict[str, Any]:
    """Run one process of `measure` and return what it wrote, also where it died or hung.

    Raises:
        UserError: it ended before it had written anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        command = [sys.executable, "-m", "gradfast.bench.measure", str(path)]
        environment = {**QUIET_PROFILER, **os.environ}
        longest = None if settings.limit is None else settings.limit + GRACE
        try:
            given = json.dumps(settings.as_json())
            code = subprocess.run(command, input=given, text=True, env=environment, timeout=longest).returncode
            end = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            end = f"did not end in {longest:.0f} s"
        if not path.exists():
            raise UserError(f"a process of the benchmark {end or 'wrote nothing'}; its message is above")
        found = json.loads(path.read_text())
        if end:
            every = dict.fromkeys(("workload", "dtype", "optimizer", "peer"), "all")
            found["left_out"].append({**every, "kind": "failed", "why": f"the process {end}; its message is above"})
        return found


def write(report: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.md, and bench.png where matplotlib is installed."""
    with atomic_write(folder / "bench.json") as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    with atomic_write(folder / "bench.md") as file:
        file.write(markdown(report).encode())
    try:
        draw_chart(report, folder / "bench.png")
    except UserError as reason:
        print(f"gradfast bench: no chart: {reason}", file=sys.stderr)


def split_document(path: Path) -> tuple[str, str]:
    """The text before and after the place of the table, marks included.

    Raises:
        UserError: the file cannot be read, or has no such place.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"--into {path}: {error.strerror or error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"--into {path}: has no line {BEGIN} with a line {END} after it")
    return before + begin + "\n", end + after


def main(arguments: Sequence[str]) -> int:
    """``gradfast bench``; returns 1 where a contender was refused or failed."""
    given = build_parser().parse_args(list(arguments))
    settings = read_settings(given)
    document = None if given.into is None else split_document(given.into)
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(given.output, error) from error
    processes = []
    for process in range(settings.processes):
        print(f"gradfast bench: process {process + 1} of {settings.processes}", file=sys.stderr, flush=True)
        processes.append(measure(settings))
    report = make_report(describe(settings.device), settings.as_json(), summarise(processes))
    write(report, given.output)
    if document is not None:
        with atomic_write(given.into) as file:
            file.write((document[0] + markdown(report) + document[1]).encode())
    print_table(report)
    print(f"gradfast bench: written to {given.output}", file=sys.stderr)
    return 1 if any(case["kind"] != "unavailable" for case in report["left_out"]) else 0
