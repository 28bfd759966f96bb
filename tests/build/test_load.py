"""The native extension is loaded only beside the torch it was built for, and says what mends it where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradfast import _load


def record(torch_version: str, cuda: str | None) -> dict[str, str | None]:
    return {"torch": torch_version, "torch_cuda": cuda}


@pytest.mark.parametrize(
    ("built", "imported"),
    [
        (("2.13.0+cpu", None), ("2.13.0+cpu", None)),
        (("2.13.0+cpu", None), ("2.13.1+cpu", None)),  # patch releases keep the binary interface
        (("2.15.0+cu130", "13.0"), ("2.15.1+cu132", "13.2")),  # so do CUDA's minor ones
    ],
)
def test_same_minor_version_and_flavour_agree(built: tuple[str, str | None], imported: tuple[str, str | None]) -> None:
    assert _load.mismatch(record(*built), *imported) is None


@pytest.mark.parametrize(
    ("built", "imported"),
    [
        (("2.13.0+cpu", None), ("2.14.0+cpu", None)),
        (("2.1.0", None), ("2.11.0", None)),
        (("2.15.0+cpu", None), ("2.15.0+cu132", "13.2")),
        (("2.15.0+cu132", "13.2"), ("2.15.0+cpu", None)),
        (("2.15.0+cu128", "12.8"), ("2.15.0+cu132", "13.2")),
    ],
)
def test_mismatch_names_both_versions_and_the_command(
    built: tuple[str, str | None], imported: tuple[str, str | None]
) -> None:
    message = _load.mismatch(record(*built), *imported)
    assert message is not None
    assert f"built for torch {built[0]} ({_load.flavour(built[1])})" in message
    assert f"torch {imported[0]} ({_load.flavour(imported[1])}) is imported" in message
    assert "-m pip install --force-reinstall --no-deps" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file://FOLDER/a%20folder", "dir_info": {}}, "'FOLDER/a folder'"),
        ({"url": "file:///gone", "dir_info": {}}, ". (in gradfast's source folder)"),
        (
            {"url": "https://host/gradfast.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "git+https://host/gradfast.git@c0ffee",
        ),
        (None, ". (in gradfast's source folder)"),
    ],
)
def test_rebuild_command_names_where_it_was_installed_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: dict[str, object] | None, source: str
) -> None:
    (tmp_path / "a folder").mkdir()
    text = json.dumps(origin).replace("FOLDER", str(tmp_path)) if origin else None

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return text

    monkeypatch.setattr(_load, "_PACKAGE", tmp_path / "site-packages" / "gradfast")
    monkeypatch.setattr(_load.metadata, "distribution", lambda name: Distribution())
    assert _load.rebuild_command().endswith(" --no-cache-dir " + source.replace("FOLDER", str(tmp_path)))


def test_rebuild_command_for_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    assert _load.rebuild_command().startswith(f"uv pip install --python {sys.executable} --reinstall --no-deps")


def test_import_of_a_build_for_another_torch_fails_with_that_message(tmp_path: Path) -> None:
    """In a process of its own: the package as it is, but for the version that its build recorded."""
    package = tmp_path / "gradfast"
    package.mkdir()
    source = Path(_load.__file__).parent
    for path in source.iterdir():
        if path.name != "_build.json" and not path.name.startswith("__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "_build.json").write_text(json.dumps({**_load.read_record(), "torch": "2.9.1+cu126"}))
    # A link's own folder counts: `_load` looks beside itself, so it has to be a copy.
    (package / "_load.py").unlink()
    (package / "_load.py").write_text((source / "_load.py").read_text())
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gradfast._load"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gradfast was built for torch 2.9.1+cu126")
    assert str(torch.__version__) in last


def test_absent_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    with pytest.raises(ImportError, match="native extension is not built") as caught:
        _load.read_record(tmp_path / "_build.json")
    assert "-m pip install" in str(caught.value)


def test_extension_of_another_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.cpython-37m-other.so").touch()
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    with pytest.raises(ImportError, match=r"found _C\.cpython-37m-other\.so, for another Python"):
        _load.read_record(tmp_path / "_build.json")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"torch": "2.13.0"}'])
def test_damaged_record_is_an_import_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    suffix = _load.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_C{suffix}").touch()
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    if content is not None:
        (tmp_path / "_build.json").write_text(content)
    with pytest.raises(ImportError, match="build is incomplete"):
        _load.read_record(tmp_path / "_build.json")


def test_record_says_what_is_imported_here() -> None:
    built = _load.read_record()
    assert _load.mismatch(built, str(torch.__version__), torch.version.cuda) is None
    assert built["cuda_architectures"] == _load.native.cuda_architectures()
    assert bool(built["cuda_toolkit"]) == _load.native.cuda_built()
