"""Settings that go together, by name: ``gradfast train --recipe NAME`` reads NAME.yaml from this folder.

The first comment line of a recipe is its description in ``--help``.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from gradfast.errors import UserError


def recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def describe_recipes() -> str:
    """A line for each recipe: its name, and what its first comment says."""
    lines = (f"  {name:<26}{path.read_text().partition(chr(10))[0].lstrip('# ')}" for name, path in recipes().items())
    return "\n".join(lines)


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: there is none of this name.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"--recipe: there is no recipe {name!r}; {hint}")
    return known[name]
