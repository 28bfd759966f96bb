"""From what the user wrote, in flags or YAML, to checked settings; and from settings to YAML."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.train.config import FIELDS, TrainConfig, flag


def check_value(name: str, value: Any, source: str) -> Any:
    """The value of setting `name` as read from a flag (text) or a YAML file (any scalar).

    Raises:
        UserError: it is not a value of this setting; `source` says where it stood.
    """
    field = FIELDS[name]
    if isinstance(value, (list, dict)):
        raise UserError(f"{source}: expected one value, got {value!r}")
    if value is None and field.default is None:
        return None
    if field.metadata["parse"] is None:
        if not isinstance(value, bool):
            raise UserError(f"{source}: expected true or false, got {value!r}")
        return value
    if isinstance(value, bool):  # YAML reads off and on as booleans
        value = (field.metadata["bare"] or "on") if value else "off"
    try:
        return field.metadata["parse"](str(value))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def check_settings(settings: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Check a mapping of YAML keys to values; unknown keys are refused with the nearest known one."""
    checked = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            raise UserError(f"{source}: unknown setting {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        checked[name] = check_value(name, value, f"{source}: {key}")
    return checked


def read_yaml(path: Path) -> dict[str, Any]:
    """The checked settings of a YAML file: a flat mapping from names to scalars."""
    from gradfast.extras import first_line, require

    yaml = require("yaml", "train", "-c")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {first_line(error)}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected lines of 'name: value'")
    return check_settings(settings, str(path))


def to_command(settings: Mapping[str, Any]) -> str:
    """The shell command of ``gradfast train`` with checked settings."""
    words = ["gradfast", "train"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name).removeprefix("--"))
        elif value is not None or name == "clip_grad":
            words += [flag(name), "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def to_yaml(config: TrainConfig, heading: str) -> str:
    """The settings as YAML that ``-c`` reads back, under comment lines."""
    from gradfast.extras import require

    comments = "".join(f"# {line}\n" for line in heading.splitlines())
    return comments + require("yaml", "train", "config.yaml").safe_dump(config.to_dict(), sort_keys=False)
