"""benchmarks/two_cores.cpp, the program of docs/performance.md: it compiles, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_it_compiles() -> None:
    source = ROOT / "benchmarks" / "two_cores.cpp"
    if not source.exists():
        pytest.skip("the tests stand alone here, beside an installed package")
    flags = ["-O3", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    found = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
