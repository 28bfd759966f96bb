"""The build backend is not part of the package: put its folder on the path, as pip does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))


@pytest.fixture
def root() -> Path:
    """The top folder of the sources."""
    return ROOT
