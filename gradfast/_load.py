"""Load the native extension, `gradfast._C`, once, and only beside the torch that it was built for.

`from gradfast._load import native` is the one way to native code. A C++ extension built for another torch fails to load
with an undefined symbol, or loads and crashes later; the build leaves a small record beside the extension
(`_build.json`), which is compared with the imported torch before the extension is touched.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

import torch

_PACKAGE = Path(__file__).parent
_RECORD = _PACKAGE / "_build.json"


def flavour(cuda: str | None) -> str:
    """Name the kind of a torch build by its `torch.version.cuda`: "CPU", or "CUDA 13" for 13.0, 13.2 and so on."""
    return f"CUDA {cuda.partition('.')[0]}" if cuda else "CPU"


def describe(version: str, cuda: str | None) -> str:
    """Describe a torch build for a message: "torch 2.13.0+cpu (CPU)"."""
    return f"torch {version} ({flavour(cuda)})"


def mismatch(record: dict[str, Any], version: str, cuda: str | None) -> str | None:
    """Say why an extension can't be used with a torch, or return None where it can.

    Patch releases of torch keep the binary interface, minor releases do not; and a build for a CPU-only torch has no
    CUDA part to serve a CUDA one with, nor does a CUDA build find its libraries in a CPU-only torch.

    Args:
        record: what the build recorded: "torch" and "torch_cuda", as `torch.__version__` and `torch.version.cuda`.
        version: `torch.__version__` of the imported torch.
        cuda: `torch.version.cuda` of the imported torch.
    """
    built_version, built_cuda = str(record["torch"]), record["torch_cuda"]
    same_minor = built_version.split(".")[:2] == version.split(".")[:2]
    if same_minor and flavour(built_cuda) == flavour(cuda):
        return None
    return (
        f"gradfast was built for {describe(built_version, built_cuda)}, but {describe(version, cuda)} is imported. "
        f"Build it again for this torch: {rebuild_command()}"
    )


def rebuild_command() -> str:
    """Return the command that builds gradfast again for the installed torch, from where it was installed from."""
    python = shlex.quote(sys.executable or "python")
    if importlib.util.find_spec("pip") is None:  # an environment that uv made
        return f"uv pip install --python {python} --reinstall --no-deps --no-cache {_source()}"
    return f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir {_source()}"


def _source() -> str:
    """Return where gradfast was installed from, as pip's argument: "-e " and the folder if it is used in place."""
    if (_PACKAGE.parent / "setup.py").is_file() and (_PACKAGE.parent / "csrc").is_dir():
        return "-e " + shlex.quote(str(_PACKAGE.parent))
    try:
        text = metadata.distribution("gradfast").read_text("direct_url.json")
        origin = json.loads(text) if text else {}
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    url, version_control = str(origin.get("url", "")), origin.get("vcs_info")
    if version_control:
        return shlex.quote(f"{version_control['vcs']}+{url}@{version_control['commit_id']}")
    path = unquote(urlparse(url).path)
    if url.startswith("file:") and Path(path).exists():
        return shlex.quote(path)
    return ". (in gradfast's source folder)"


def read_record(path: Path = _RECORD) -> dict[str, Any]:
    """Read what the build recorded about itself; ImportError if gradfast was not built for this Python."""
    extensions = [_PACKAGE / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    if not any(extension.is_file() for extension in extensions):
        others = sorted(other.name for other in _PACKAGE.glob("_C.*"))
        found = f" (found {', '.join(others)}, for another Python)" if others else ""
        raise ImportError(f"gradfast's native extension is not built{found}. Build it: {rebuild_command()}")
    try:
        record = json.loads(path.read_text())
        return {**record, "torch": str(record["torch"]), "torch_cuda": record["torch_cuda"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImportError(f"gradfast's build is incomplete ({path.name}: {error}). {rebuild_command()}") from error


def load() -> ModuleType:
    """Check the record, then load the extension.

    Raises:
        ImportError: gradfast is not built, or built for another torch; the message holds the command that mends it.
    """
    record = read_record()
    version, cuda = str(torch.__version__), torch.version.cuda
    if problem := mismatch(record, version, cuda):
        raise ImportError(problem)
    try:
        return importlib.import_module("gradfast._C")
    except ImportError as error:
        raise ImportError(
            f"gradfast's native extension does not load ({error}). It was built for "
            f"{describe(record['torch'], record['torch_cuda'])}; imported is {describe(version, cuda)}. "
            f"Build it again: {rebuild_command()}"
        ) from error


native = load()
