"""``gradfast runs``: a table of runs, or some of them side by side."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.runs.compare import build_tables, to_json
from gradfast.runs.folder import RunFolder, find_runs, is_run, read_run_folder
from gradfast.runs.listing import ABOUT, COLUMNS, WIDTH, build_table, sort_runs, to_dict
from gradfast.train.results.output import RUNS, find_run

DESCRIPTION = """\
List runs of gradfast train, the latest first; or, given two and more of them, put them side by side: the settings in
which they differ, and what came out.

  gradfast runs                              every run below runs/
  gradfast runs /data/sweep --sort best      every run below another folder, the best first
  gradfast runs resnet50-elpv-1 resnet50-elpv-2    compare two runs (of runs/, or give their paths)
  gradfast runs --json --limit 1             the latest run, for a script

A run is running while its folder is locked (on this machine), finished when all its epochs are done, stopped when
some are not (gradfast train --resume FOLDER goes on), and broken where its tables are missing or damaged: what is
wrong with it stands below the table. Nothing is changed, and no checkpoint is read."""


def build_parser() -> CommandParser:
    about = "columns:\n" + "\n".join(f"  {name:<8}{text}" for name, text in ABOUT.items())
    parser = CommandParser(prog="gradfast runs", description=DESCRIPTION, epilog=about)
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="runs to compare, or folders to search (default: runs)"
    )
    parser.add_argument(
        "--sort", metavar="COLUMN", default="age", help=f"the order of the list: {', '.join(COLUMNS)} (default: age)"
    )
    parser.add_argument("--limit", metavar="N", type=int, help="show the first N of the list")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast runs``; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.sort not in COLUMNS:
        raise UserError(f"--sort: expected one of {', '.join(COLUMNS)}, got {options.sort!r}")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit: expected a whole number of at least 1, got {options.limit}")
    folders = [find_run(name) for name in options.folders]
    if len(folders) > 1 and all(map(is_run, folders)):
        compare([read_run_folder(folder) for folder in folders], options.json)
        return 0
    if not folders and not RUNS.is_dir():
        raise UserError(f"there is no folder {RUNS} here; gradfast train makes it, or give the folder of your runs")
    paths = dict.fromkeys(path for folder in folders or [RUNS] for path in find_runs(folder))
    runs = sort_runs([read_run_folder(path) for path in paths], options.sort)[: options.limit]
    show_list(runs, options.json, [str(folder) for folder in folders or [RUNS]])
    return 0


def show_list(runs: Sequence[RunFolder], as_json: bool, searched: Sequence[str]) -> None:
    if as_json:
        print(json.dumps([to_dict(run) for run in runs], indent=1))
        return
    if not runs:
        print(f"no runs in {', '.join(searched)}")
        return
    console = make_console()
    table, heading = build_table(runs, console.width)
    if heading:
        console.print(heading, markup=False, soft_wrap=True)
    console.print(table)
    for run in runs:
        for problem in run.problems:
            console.print(f"{run.path}: {problem}", markup=False, soft_wrap=True)


def compare(runs: Sequence[RunFolder], as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(runs), indent=1))
        return
    console = make_console()
    for number, table in enumerate(build_tables(runs, console.width)):
        if number:
            console.print()
        console.print(table)
    for run in runs:
        for problem in run.problems:
            console.print(f"{run.path}: {problem}", markup=False, soft_wrap=True)


def make_console() -> Any:
    """Rich on a terminal, plain text of 100 columns (or $COLUMNS) elsewhere."""
    require("rich", "train", "gradfast runs")
    from rich.console import Console

    given = os.environ.get("COLUMNS", "")
    width = int(given) if given.isdecimal() and int(given) > 0 else WIDTH
    if sys.stdout.isatty():
        width = shutil.get_terminal_size((WIDTH, 0)).columns
    return Console(file=sys.stdout, width=width, highlight=False)
