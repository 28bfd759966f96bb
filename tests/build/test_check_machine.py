"""What a machine lacks is said in one line, with what to install."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import check_machine


def write_compiler(path: Path, *macros: str) -> None:
    lines = "\n".join(f"echo '#define {macro}'" for macro in macros)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def message(call: object) -> str:
    with pytest.raises(SystemExit) as caught:
        call()  # type: ignore[operator]
    text = str(caught.value)
    assert text.startswith("gradfast: ")
    assert "\n" not in text
    return text


def test_this_machine_passes() -> None:
    check_machine.main()


def test_python_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert "Python 3.9.18" in message(check_machine.main)


def test_missing_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ensurepip(name: str, *arguments: object, **keywords: object) -> object:
        if name == "ensurepip":
            raise ImportError(name)
        return real(name, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_ensurepip)
    text = message(check_machine.main)
    assert f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in text


def test_missing_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check_machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "-dev" in message(check_machine.require_compiler)


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler is not found)" in message(check_machine.require_compiler)


def test_clang_is_refused_for_its_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiler(tmp_path / "clang++", "__clang__ 1", "__GNUC__ 4")
    monkeypatch.setenv("CXX", str(tmp_path / "clang++"))
    assert "is not g++" in message(check_machine.require_compiler)


def test_old_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiler(tmp_path / "g++-9", "__GNUC__ 9")
    monkeypatch.setenv("CXX", str(tmp_path / "g++-9"))
    assert "g++ 9 is too old" in message(check_machine.require_compiler)


def test_new_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_compiler(tmp_path / "g++-15", "__GNUC__ 15")
    monkeypatch.setenv("CXX", f"env LC_ALL=C {tmp_path / 'g++-15'}")
    check_machine.require_compiler()


@pytest.mark.parametrize(
    ("version", "new_enough"),
    [("65.5.0", False), ("77.0.2", False), ("77.0.3", True), ("84", True), ("0.dev0+unknown", True)],
)
def test_setuptools(monkeypatch: pytest.MonkeyPatch, version: str, new_enough: bool) -> None:
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(__version__=version))
    if new_enough:
        check_machine.require_setuptools()
    else:
        assert f"setuptools {version} is too old to build with: pip install" in message(
            check_machine.require_setuptools
        )
