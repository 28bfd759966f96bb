"""Imports of optional packages that end in one clear line instead of a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType

from gradfast.errors import UserError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the name to import.
        extra: the gradfast extra that installs it.
        purpose: what needs it, for the message.

    Raises:
        UserError: it is not installed, or (as with a torchvision built for another torch) installed but broken.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise UserError(
            f"{purpose} needs the package {missing!r}, which is not installed: pip install 'gradfast[{extra}]'"
        ) from error
    except Exception as error:  # a broken binary package may raise anything while it loads
        raise UserError(
            f"{purpose} needs the package {module!r}, which is installed but does not load ({first_line(error)}); "
            "install the release that matches your torch"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
