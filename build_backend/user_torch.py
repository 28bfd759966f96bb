"""Find the torch that the user already has, from inside an isolated build.

An extension must be compiled against the very torch it will run with. Naming torch in `build-system.requires` would
fetch a second one into the isolated build environment; not naming it leaves `import torch` failing there. So the
build looks where the user's torch is: the site-packages of the environment that the package is being installed into.

- pip runs the build with the target interpreter and only masks its site-packages: `sysconfig` still knows them.
- uv and `python -m build` run it in another prefix, and set or keep `VIRTUAL_ENV` to it: the process that started the
  build (Linux: /proc) still knows which environment it serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST_TORCH = (2, 11)


def make_importable() -> None:
    """Make `import torch` find the user's torch; `SystemExit` with what to do when there is none.

    The folder found is appended to `sys.path`, so that the build's own requirements keep precedence.
    """
    if importlib.util.find_spec("torch") is None:
        searched = list(dict.fromkeys(candidate_folders()))
        folder = next((folder for folder in searched if (folder / "torch" / "version.py").is_file()), None)
        if folder is None:
            raise SystemExit(missing_torch_message(searched))
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    check_version()


def check_version() -> None:
    """Refuse a torch older than `OLDEST_TORCH` before any compiling starts."""
    if minor_version() < OLDEST_TORCH:
        import torch

        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(f"gradfast: torch {torch.__version__} is too old: gradfast needs torch >= {oldest}")


def minor_version() -> tuple[int, int]:
    """Return the major and minor version of the torch that is imported."""
    import torch

    major, minor = str(torch.__version__).split(".")[:2]
    return int(major), int(minor)


def requirement() -> str:
    """Return the requirement of a build made here: the torch found, up to patch releases."""
    make_importable()
    return "torch=={}.{}.*".format(*minor_version())


def any_requirement() -> str:
    """Return the requirement of the sources."""
    return "torch>={}.{}".format(*OLDEST_TORCH)


def missing_torch_message(searched: list[Path]) -> str:
    """Say which Python has no torch, where it was looked for, and what to type."""
    places = "\n".join(f"  {folder}" for folder in searched) or "  (no site-packages found)"
    return (
        f"gradfast: PyTorch is not installed for this Python {sys.version_info[0]}.{sys.version_info[1]}.\n"
        "gradfast is compiled against the torch you train with, so install that one first, then gradfast:\n"
        "  pip install torch\n"
        "  pip install .\n"
        "If torch is installed in another environment, activate that environment, or build with\n"
        "--no-build-isolation from it. Looked in:\n"
        f"{places}"
    )


def candidate_folders() -> Iterator[Path]:
    """Yield the site-packages folders that may hold the user's torch, the most certain first."""
    for scheme in sysconfig.get_scheme_names():
        if (os.name in scheme and "user" not in scheme) or scheme in ("venv", "deb_system"):
            for key in ("platlib", "purelib"):
                yield from existing(Path(sysconfig.get_path(key, scheme)))
    if sys.prefix != sys.base_prefix and shares_system_packages(Path(sys.prefix)):
        yield from site_packages(Path(sys.base_prefix))
    if sys.prefix == sys.base_prefix:
        yield from existing(Path(site.getusersitepackages()))
    for prefix in (*prefixes_in(os.environ), *prefixes_of_front_end()):
        yield from site_packages(prefix)


def prefixes_in(environment: os._Environ[str] | dict[str, str]) -> Iterator[Path]:
    """Yield the environments that a set of environment variables calls active."""
    for name in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        if environment.get(name):
            yield Path(environment[name])


def prefixes_of_front_end() -> Iterator[Path]:
    """Yield the environments that the program which started this build (uv, `python -m build`) may be serving.

    uv sets `VIRTUAL_ENV` to the build's own prefix, so the user's choice is only to be read from uv itself: its
    `--python`, its environment variables, then the `.venv` that it would discover from its working folder upwards.
    """
    process = Path("/proc") / str(os.getppid())
    try:
        arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        folder = (process / "cwd").resolve(strict=True)
    except OSError:
        return
    named = [after for flag, after in itertools.pairwise(arguments) if flag in ("--python", "-p", "--prefix")]
    named += [flag.partition("=")[2] for flag in arguments if flag.startswith(("--python=", "--prefix="))]
    if Path(arguments[0]).name.startswith("python"):
        named.append(arguments[0])
    for path in (folder / name for name in named if "/" in name):
        yield from (path, path.parent.parent)
    if "--system" in arguments:
        yield Path(sys.base_prefix)
    yield from prefixes_in(dict(variable.partition("=")[::2] for variable in variables))
    for parent in (folder, *folder.parents):
        if (parent / ".venv" / "pyvenv.cfg").is_file():
            yield parent / ".venv"
            return


def site_packages(prefix: Path) -> Iterator[Path]:
    """Yield the site-packages folders under `prefix` that belong to this version of Python."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for library in ("lib", "lib64"):
        for name in ("site-packages", "dist-packages"):
            yield from existing(prefix / library / python / name)


def shares_system_packages(prefix: Path) -> bool:
    """Tell whether the virtual environment at `prefix` was made with `--system-site-packages`."""
    try:
        text = (prefix / "pyvenv.cfg").read_text()
    except OSError:
        return False
    return "include-system-site-packages = true" in text.lower()


def existing(folder: Path) -> Iterator[Path]:
    """Yield `folder`, links resolved, if it is there."""
    if folder.is_dir():
        yield folder.resolve()
