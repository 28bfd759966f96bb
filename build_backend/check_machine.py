"""Check that this machine has what building gradfast takes, and say in one line what to install where it has not.

`python3 check_machine.py` checks Python's version, venv, headers and the C++ compiler; the Makefile runs it before it
makes an environment. It must run, and fail with its own message, under any Python 3.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig

OLDEST_PYTHON = (3, 10)
OLDEST_COMPILER = 10  # the first g++ with the parts of C++20 that torch's headers use
OLDEST_SETUPTOOLS = (77, 0, 3)  # the first to read the licence as pyproject.toml gives it


def main():
    """Exit with a message for the first thing that is missing."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        stop(f"Python {version} ({sys.executable}) is too old: {oldest} is needed; name another: PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        stop(f"{sys.executable} can't make virtual environments; on Debian or Ubuntu: sudo apt install {package}")
    require_compiler()


def require_compiler():
    """Exit with a message unless there are Python's headers and a g++ that is new enough."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # noqa: PTH118
    if not os.path.isfile(header):  # noqa: PTH113
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        stop(f"Python's C headers are missing ({header}); on Debian or Ubuntu: sudo apt install {package}")
    command = shlex.split(os.environ.get("CXX") or "c++")
    install = "on Debian or Ubuntu: sudo apt install g++"
    if not command or shutil.which(command[0]) is None:
        stop(f"there is no C++ compiler ({' '.join(command)} is not found); {install}")
    macros = predefined_macros(command)
    if "__clang__" in macros or "__GNUC__" not in macros:
        # clang's OpenMP calls a runtime of its own, which torch does not load.
        stop(f"{' '.join(command)} is not g++, which sharing torch's OpenMP threads takes; set CXX=g++, or {install}")
    if int(macros["__GNUC__"]) < OLDEST_COMPILER:
        stop(f"g++ {macros['__GNUC__']} is too old, {OLDEST_COMPILER} is needed; name another: CXX=g++-12")


def require_setuptools():
    """Exit with a message unless setuptools is new enough; only a build without isolation can meet an old one."""
    import setuptools

    version = tuple(int(part) for part in setuptools.__version__.split(".")[:3] if part.isdigit())
    if (0,) < version < OLDEST_SETUPTOOLS:  # 0.dev0+unknown, as a copy without metadata calls itself, may be any
        oldest = ".".join(map(str, OLDEST_SETUPTOOLS))
        stop(f"setuptools {setuptools.__version__} is too old to build with: pip install 'setuptools>={oldest}'")


def predefined_macros(command):
    """Return the macros that a compiler defines by itself, which tell what it is."""
    try:
        output = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = (line.split(maxsplit=2) for line in output.splitlines())
    return {words[1]: words[2] if len(words) > 2 else "" for words in lines if len(words) > 1}


def stop(message):
    """Exit with status 1 and one line."""
    raise SystemExit("gradfast: " + message)


if __name__ == "__main__":
    main()
