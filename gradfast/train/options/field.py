"""What a setting is: a dataclass field that knows its flag's group, parser and help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gradfast.train import parse

GROUPS = {
    "task": "what to learn",
    "data": "what to learn it from",
    "model": "what to train",
    "optimisation": "how fast to move, and for how long",
    "regularisation": "what keeps the model from learning the images by heart",
    "gradients": "what keeps a step from blowing up",
    "detection": "how objects are found (--task detect)",
    "machine": "where and how it runs",
    "results": "what is written, and where",
}


def option(
    default: Any, parse: Callable[[str], Any] | None, group: str, help: str, metavar: str = "", bare: str | None = None
) -> Any:
    """A field of the configuration.

    Args:
        parse: text to value; None for a switch.
        bare: the value that the flag takes when it stands without one.
    """
    return dataclasses.field(
        default=default, metadata={"parse": parse, "group": group, "help": help, "metavar": metavar, "bare": bare}
    )


def choice(default: str | None, group: str, help: str, *choices: str, bare: str | None = None) -> Any:
    return option(default, parse.one_of(*choices), group, help, "{" + ",".join(choices) + "}", bare)


def switch(group: str, help: str, default: bool | None = False) -> Any:
    """A setting with two flags, --name and --no-name."""
    return option(default, None, group, help)
