"""``gradfast plot``: a report of one run, or several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.files import atomic_write, make_folder
from gradfast.monitor.page import png
from gradfast.monitor.plot import draw_run
from gradfast.monitor.record import read_run
from gradfast.train.results.output import find_run

OVERLAY = "overlay.png"

DESCRIPTION = """\
Draw what a run's gradients did, or lay several runs over one another.

  gradfast plot runs/today                 a folder with monitor.jsonl, or one of gradfast train
  gradfast plot runs/today runs/yesterday  both in one picture
  gradfast plot runs/lr-* --output lr.png

One run: norms.png (the global norm of every step, before and after clipping, with events), layers.png (each layer's
norm over time, as a heat map), updates.png, distribution.png, and report.html, one page with all of them, in the run's
folder. Several: overlay.png in this folder, with training loss, held-out metric, gradient norm with its clip limit,
and learning rate; summary.csv and steps.csv are enough."""


def main(arguments: Sequence[str]) -> int:
    """``gradfast plot``; returns the exit code."""
    parser = CommandParser(prog="gradfast plot", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, its name in runs/, or a monitor's file")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help=f"one run: folder for its pictures (default: its own); several: the picture's file (default: {OVERLAY})",
    )
    options = parser.parse_args(arguments)
    paths = [find_run(name) for name in options.runs]
    if len(paths) > 1:
        print(write_overlay(paths, Path(options.output or OVERLAY)))
        return 0
    (path,) = paths
    folder = Path(options.output) if options.output else path if path.is_dir() else path.parent
    for file in draw_run(read_run(path), folder):
        print(file)
    return 0


def write_overlay(paths: Sequence[Path], output: Path) -> Path:
    """Draw several runs into one PNG file.

    Raises:
        UserError: a run is not there, or the picture cannot be written.
    """
    if output.is_dir():
        output = output / OVERLAY
    elif output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: several runs make one PNG; give a name that ends in .png, or a folder")
    from gradfast.runs.overlay import draw_overlay, read_curves  # reads runs of gradfast train, with its packages

    picture = png(draw_overlay(read_curves(paths)))
    make_folder(output.parent)
    with atomic_write(output) as file:
        file.write(picture)
    return output
