"""The command line of ``gradfast data``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.train import parse

DESCRIPTION = """\
Data sets, before anything is trained on them.

  gradfast data make-scenes scenes/        a detection data set of solar cells in COCO's format, without a download
  gradfast data check photos/              what gradfast train would skip of your data, and what is left"""

SCENES = """\
Compose scenes from the photographs of the package elpv-dataset (pip install 'gradfast[demo]'): functional and
defective cells at random places, sizes and right-angle rotations, boxes exact, in COCO's format. Training and held-out
scenes are made of different photographs. The photographs' licence, CC BY-NC-SA 4.0 (not for commercial use), is the
scenes', too."""

CHECK = """\
Read every file of an image folder or of COCO data as gradfast train would, and say what it would skip and why.
The exit code is 0 where nothing would be skipped, and 1 otherwise."""

NAMED_AT_MOST = 20
SMALLEST = 32  # pixels: below it, a cell shows nothing


def number(check: Callable[[str], int]) -> Callable[[str], int]:
    """A parser of the trainer's flags, for argparse: it says what was expected."""

    def convert(text: str) -> int:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def build_parser() -> CommandParser:
    parser = CommandParser(prog="gradfast data", description=DESCRIPTION)
    count = number(parse.positive_int)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    scenes = commands.add_parser("make-scenes", description=SCENES, help="compose a detection data set")
    scenes.add_argument("folder", metavar="FOLDER", type=Path, help="where it goes; must not exist")
    scenes.add_argument("--images", metavar="N", type=count, default=300, help="training scenes (default: %(default)s)")
    scenes.add_argument(
        "--val-images", metavar="N", type=count, default=100, help="held-out scenes (default: %(default)s)"
    )
    scenes.add_argument(
        "--size", metavar="PIXELS", type=count, default=224, help="side of the square scenes (default: %(default)s)"
    )
    scenes.add_argument(
        "--cells",
        metavar=("FEWEST", "MOST"),
        type=count,
        nargs=2,
        default=(2, 6),
        help="cells in a scene (default: 2 6)",
    )
    scenes.add_argument(
        "--seed", metavar="N", type=number(parse.seed), default=0, help="same seed, same scenes (default: %(default)s)"
    )
    check = commands.add_parser("check", description=CHECK, help="say what gradfast train would skip")
    check.add_argument("folder", metavar="FOLDER", type=Path, help="an image folder, or a folder of COCO data")
    check.add_argument("--all", action="store_true", help=f"name all that is wrong, not only the first {NAMED_AT_MOST}")
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast data``; returns the exit code."""
    options = build_parser().parse_args(arguments)
    for package in ("numpy", "PIL", "torchvision", "rich"):
        require(package, "train", "gradfast data")
    return {"make-scenes": run_make_scenes, "check": run_check}[options.command](options)


def run_make_scenes(options: argparse.Namespace) -> int:
    from gradfast.data.compose import Design
    from gradfast.data.scenes import make_scenes
    from gradfast.train.data.elpv import list_elpv

    fewest, most = options.cells
    if fewest > most:
        raise UserError(f"--cells {fewest} {most}: the fewest are more than the most")
    if options.size < SMALLEST:
        raise UserError(f"--size {options.size}: at least {SMALLEST} pixels, or a cell shows nothing")
    counts = (options.images, options.val_images)
    design = Design(options.size, (fewest, most))
    make_scenes(options.folder, list_elpv(), counts, design, options.seed, bar("composing scenes"))
    print(f"{options.folder}: {counts[0]} training and {counts[1]} held-out scenes of {options.size} pixels")
    print("licence: CC BY-NC-SA 4.0, that of the photographs; see LICENSE.txt in it")
    print(f"next: gradfast train --task detect --data {options.folder}")
    return 0


def run_check(options: argparse.Namespace) -> int:
    from gradfast.data.check import check_data

    report = check_data(options.folder, bar("reading images"))
    for line in report.lines(None if options.all else NAMED_AT_MOST):
        print(line)
    return 1 if report.bad else 0


def bar(label: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def wrap(items: Iterable[Any], total: int) -> Iterable[Any]:
        return track(items, label, total, console=console, transient=True, disable=not console.is_terminal)

    return wrap
