"""The argument parser of every sub-command."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from gradfast.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line each, and whose description keeps its lines.

    Flags are not to be abbreviated: a new flag must not change what an old command line means.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the flags")
