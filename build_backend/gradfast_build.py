"""The build backend: setuptools, plus the torch that the user already has.

See `user_torch` for how it is found and why torch is not an ordinary build requirement.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (what needs no torch, or looks for it in setup.py)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import check_machine
import user_torch

check_machine.require_setuptools()

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """The first hook of an installation: check here that there is a torch, before anything is fetched or built."""
    user_torch.make_importable()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As `get_requires_for_build_wheel`."""
    user_torch.make_importable()
    return build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel against the user's torch."""
    user_torch.make_importable()
    # setuptools never empties this folder: a module deleted since the last build would be installed again.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel against the user's torch."""
    user_torch.make_importable()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
