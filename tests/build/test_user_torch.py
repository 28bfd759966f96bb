"""Finding the user's torch from an isolated build, in environments made of a few files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import user_torch

PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def make_environment(prefix: Path, torch_version: str | None = "2.13.0", python: str = PYTHON) -> Path:
    """Write what counts of a virtual environment; returns its site-packages."""
    folder = prefix / "lib" / python / "site-packages"
    folder.mkdir(parents=True)
    (prefix / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    (prefix / "bin").mkdir()
    if torch_version:
        (folder / "torch").mkdir()
        (folder / "torch" / "version.py").write_text("")
        (folder / "torch" / "__init__.py").write_text(f"__version__ = {torch_version!r}\n")
    return folder


def run_isolated(root: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` beside the backend in a Python that sees no site-packages, as in pip's isolated build."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [getattr(sys, "_base_executable", sys.executable), "-S", "-c", code],
        cwd=root,
        env={**kept, "PYTHONPATH": str(root / "build_backend"), "PYTHONNOUSERSITE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


#: The parent process would be pytest's own: its environment may hold a real torch.
FIND = "import user_torch; user_torch.prefixes_of_front_end = lambda: iter(()); user_torch.make_importable()"
#: The base interpreter's own folders may hold one, too.
ALONE = FIND.replace("user_torch.make", "user_torch.sysconfig.get_scheme_names = lambda: (); user_torch.make")


def test_torch_of_the_active_environment_is_found(tmp_path: Path, root: Path) -> None:
    folder = make_environment(tmp_path / "venv")
    code = ALONE + "; import torch, sys; print(torch.__version__, sys.path[-1])"
    result = run_isolated(root, code, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert result.stdout.split() == ["2.13.0", str(folder)], result.stderr


def test_a_build_requires_the_minor_version_it_was_built_against(tmp_path: Path, root: Path) -> None:
    make_environment(tmp_path / "venv", torch_version="2.13.1+cpu")
    code = ALONE + "; print(user_torch.requirement(), user_torch.any_requirement())"
    result = run_isolated(root, code, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert result.stdout.split() == ["torch==2.13.*", "torch>=2.11"], result.stderr


def test_no_torch_says_what_to_install(tmp_path: Path, root: Path) -> None:
    folder = make_environment(tmp_path / "venv", torch_version=None)
    result = run_isolated(root, ALONE, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert result.returncode == 1
    assert "PyTorch is not installed for this Python" in result.stderr
    assert "pip install torch\n" in result.stderr
    assert str(folder) in result.stderr
    assert "Traceback" not in result.stderr
    assert "No module named" not in result.stderr


def test_first_hook_of_the_backend_gives_that_message(tmp_path: Path, root: Path) -> None:
    # As a front end calls it: setuptools is there as a build requirement, torch is not.
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    setuptools = importlib.util.find_spec("setuptools")
    assert setuptools is not None
    assert setuptools.origin is not None
    installed = Path(setuptools.origin).parent.parent
    for package in ("setuptools", "_distutils_hack"):
        (requirements / package).symlink_to(installed / package)
    code = ALONE.replace("user_torch.make_importable()", "import gradfast_build as b; b.get_requires_for_build_wheel()")
    path = os.pathsep.join([str(root / "build_backend"), str(requirements)])
    result = run_isolated(root, code, PYTHONPATH=path, VIRTUAL_ENV=str(tmp_path))
    assert result.returncode == 1
    assert "PyTorch is not installed for this Python" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_torch_too_old_is_refused_before_anything_is_compiled(tmp_path: Path, root: Path) -> None:
    make_environment(tmp_path / "venv", torch_version="2.10.1+cu128")
    result = run_isolated(root, ALONE, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert result.returncode == 1
    assert "torch 2.10.1+cu128 is too old: gradfast needs torch >= 2.11" in result.stderr


def test_environment_of_another_python_is_not_used(tmp_path: Path, root: Path) -> None:
    make_environment(tmp_path / "venv", python="python3.7")
    result = run_isolated(root, ALONE, VIRTUAL_ENV=str(tmp_path / "venv"))
    assert result.returncode == 1


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc to ask")
@pytest.mark.parametrize("way", ["environment", "argument", "discovered", "folder of the program"])
def test_environment_is_learnt_from_the_front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A process that looks like uv, or like `python -m build`, stands for the one that started this build."""
    prefix = tmp_path / (".venv" if way == "discovered" else "venv")
    folder = make_environment(prefix)
    environment = {"PATH": os.environ["PATH"]}
    arguments = ["uv", "pip", "install", "."]
    if way == "environment":
        environment["VIRTUAL_ENV"] = str(prefix)
    elif way == "argument":
        arguments += ["--python", str(prefix / "bin" / "python")]
    elif way == "folder of the program":
        arguments = [str(prefix / "bin" / "python"), "-m", "build"]
    (tmp_path / "project").mkdir()
    script = "import time; print('ready', flush=True); time.sleep(60)"
    # argv[0] and what follows the script are free to choose; "-c SCRIPT" comes between them.
    front_end = subprocess.Popen(
        [arguments[0], "-c", script, *arguments[1:]],
        executable=sys.executable,
        env=environment,
        cwd=tmp_path / "project",
        stdout=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 30
        assert front_end.stdout is not None
        assert front_end.stdout.readline() == b"ready\n"
        assert time.monotonic() < deadline
        monkeypatch.setattr(user_torch.os, "getppid", lambda: front_end.pid)
        folders = [found for prefix in user_torch.prefixes_of_front_end() for found in user_torch.site_packages(prefix)]
    finally:
        front_end.kill()
        front_end.communicate()
    assert folders[:1] == [folder]


def test_front_end_that_can_not_be_asked_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_torch.os, "getppid", lambda: 2**31 - 1)
    assert list(user_torch.prefixes_of_front_end()) == []


def test_system_packages_are_used_only_where_the_environment_shares_them(tmp_path: Path) -> None:
    make_environment(tmp_path)
    assert not user_torch.shares_system_packages(tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert user_torch.shares_system_packages(tmp_path)
    assert not user_torch.shares_system_packages(tmp_path / "absent")
