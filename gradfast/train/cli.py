"""The command line of ``gradfast train``: flags over the YAML of ``-c`` over a recipe over the defaults."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.train.config import FIELDS, flag
from gradfast.train.machine.processes import open_world
from gradfast.train.options.field import GROUPS
from gradfast.train.options.task import TASK_DEFAULTS
from gradfast.train.recipes import describe_recipes, find_recipe
from gradfast.train.settings import check_value, read_yaml

DESCRIPTION = """\
Train an image classifier or a detector with gradfast: every step measures the gradient's global norm, clips and
updates in one pass, so clipping costs nothing and the norm is there to look at.

  gradfast train                               ResNet50 on photographs of solar cells, a few minutes on two cores
  gradfast train --data photos/ --epochs 30    your own folder of classes
  gradfast train --data cifar10 --data-root sets/ --img-size 32      a data set of torchvision
  gradfast train --task detect --data scenes/  boxes around objects, from annotations in COCO's format
  gradfast train --recipe tiny                 settings that go together; the recipes are listed at the end
  gradfast train --lr-find                     look for the learning rate first
  gradfast train --on-spike rollback           go back to a snapshot where training blows up
  gradfast train --resume auto                 continue what was interrupted
  torchrun --nproc_per_node=4 -m gradfast train ...     on four GPUs, or as many processes on CPUs

In the run folder: summary.csv (a line per epoch), steps.csv (a line per step), events.jsonl (what went wrong, if it
did), curves.png, config.yaml, and the checkpoints last.pt and best.pt."""


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="gradfast train",
        description=DESCRIPTION,
        epilog=f"recipes:\n{describe_recipes()}",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE.yaml", help="settings as 'name: value' lines; flags override them"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="settings of a recipe in the package; those of -c and flags override them"
    )
    groups = {name: parser.add_argument_group(f"{name}: {purpose}") for name, purpose in GROUPS.items()}
    for name, field in FIELDS.items():
        meta = field.metadata
        if meta["parse"] is None:
            groups[meta["group"]].add_argument(
                flag(name), action=argparse.BooleanOptionalAction, help=meta["help"], dest=name
            )
            continue
        text = meta["help"] if field.default is None else f"{meta['help']} (default: {describe_default(name)})"
        bare = {"nargs": "?", "const": meta["bare"]} if meta["bare"] else {}
        groups[meta["group"]].add_argument(flag(name), metavar=meta["metavar"], help=text, dest=name, **bare)
    return parser


def describe_default(name: str) -> str:
    """A setting's default, and where that of a task is another."""
    others = [f"{task}: {defaults[name]}" for task, defaults in TASK_DEFAULTS.items() if name in defaults]
    return "; with --task ".join([str(FIELDS[name].default), *others])


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The checked settings that the user gave, from ``-c`` and flags; what is not in it keeps its default.

    Raises:
        UserError: an unknown flag or key, or a value that is not one of the setting's.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "gradfast train --help lists the flags"
        raise UserError(f"unknown argument {unknown[0]!r}; {hint}")
    given = vars(known)
    path = given.pop("config", None)
    recipe = given.pop("recipe", None)
    settings = read_yaml(find_recipe(recipe)) if recipe is not None else {}
    settings.update(read_yaml(Path(path)) if path is not None else {})
    settings.update({name: check_value(name, value, flag(name)) for name, value in given.items()})
    return settings


def main(arguments: Sequence[str]) -> int:
    """``gradfast train``; returns the exit code."""
    with open_world() as world:
        settings = read_settings(arguments)
        for package in ("numpy", "PIL", "torchvision"):
            require(package, "train", "gradfast train")
        from gradfast.train.run import run  # needs them all; --help and a mistyped flag do not

        return run(settings, world)
