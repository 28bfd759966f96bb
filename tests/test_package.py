"""The package's public face: every symbol can be imported and says what it does; types are shipped."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradfast

# Used from the command line; or a folder whose modules are imported one by one.
WITHOUT_SYMBOLS = ("gradfast.bench", "gradfast.data", "gradfast.runs", "gradfast.train", "gradfast.integrations")


def public_modules() -> list[str]:
    """gradfast and its packages: what a user imports from."""
    found = pkgutil.walk_packages(gradfast.__path__, "gradfast.")
    return ["gradfast", *(m.name for m in found if m.ispkg and not m.name.rpartition(".")[2].startswith("_"))]


@pytest.mark.parametrize("module_name", public_modules())
def test_every_public_symbol_is_there_and_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert module.__doc__, module_name
    assert getattr(module, "__all__", None) or module_name.startswith(WITHOUT_SYMBOLS), f"{module_name} has no __all__"
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        symbol = getattr(module, name)
        if not (inspect.isclass(symbol) or inspect.isfunction(symbol)):
            continue
        assert symbol.__doc__, f"{module_name}.{name} has no docstring"
        if not inspect.isclass(symbol):
            continue
        for attribute, value in vars(symbol).items():
            function = value.fget if isinstance(value, property) else value
            if attribute.startswith("_") or not inspect.isfunction(function):
                continue
            assert inspect.getdoc(getattr(symbol, attribute)), f"{module_name}.{name}.{attribute} has no docstring"


def test_types_are_shipped() -> None:
    assert (Path(gradfast.__file__).parent / "py.typed").is_file()


def test_one_import_reaches_every_room_of_the_library_and_loads_no_extra() -> None:
    extras = "{'torchvision', 'matplotlib', 'rich', 'yaml', 'tensorboard', 'elpv_dataset'}"
    rooms = "gradfast.clip.ZClip, gradfast.guard.Guard, gradfast.monitor.Monitor, gradfast.nn.init_model"
    program = f"import sys, gradfast; {rooms}; print(*({extras} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_policy_runs_under_the_host_shim() -> None:
    """The device tests name each of csrc/rules/chain.h."""
    root = Path(__file__).parents[1]
    listed = re.search(r"PolicyList<([^>]+)>;", (root / "csrc" / "rules" / "chain.h").read_text())
    assert listed is not None
    kinds = [name.strip() for name in listed[1].split(",")]
    text = (root / "tests" / "device" / "test_policies.cpp").read_text()
    assert len(kinds) >= 6 and not [kind for kind in kinds if f"k{kind}" not in text]
