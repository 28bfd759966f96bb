"""Fixtures of the tests of training."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from train.cases import STEPS, Break, write_images


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, here and in the processes started: tiny images gain nothing from two, and lose on a busy machine."""
    torch = pytest.importorskip("torch")
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 images of two classes, one folder each: read only."""
    return write_images(tmp_path_factory.mktemp("data") / "photos", {"dots": 12, "stripes": 16})


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Ten images of two classes that a test may spoil."""
    return write_images(tmp_path / "photos", {"dots": 5, "stripes": 5})


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run where a stray file would be seen: in an empty folder of the test's own."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Breaks a run from within: see `Break`."""
    from gradfast.train.tasks.classify import ClassObjective

    losses = ClassObjective.losses

    def install(factor: Callable[[int], float]) -> None:
        def spoilt(self: ClassObjective, model: Any, batch: Any) -> Any:
            loss, parts = losses(self, model, batch)
            return loss * factor(batch.number[0] * STEPS + batch.number[1]), parts

        monkeypatch.setattr(ClassObjective, "losses", spoilt)

    return install


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str], str]:
    """Run a command that must end in one line on stderr that matches a pattern, exit code 2 and no traceback."""
    from gradfast.cli import main

    def check(command: list[str], pattern: str) -> str:
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("gradfast: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert re.search(pattern, error), error
        return error

    return check
