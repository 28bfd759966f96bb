"""Find a CUDA toolkit that matches the installed torch, and choose the architectures to compile for.

Whether gradfast is built with CUDA is decided by the toolkit alone, never by whether a GPU is visible: login nodes,
containers and CI machines build for GPUs that they do not have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Ampere to Blackwell; the last one also as PTX, which later GPUs compile for themselves when they load it.
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its root folder, its version ("13.0"), and where the CUDA runtime library is."""

    root: Path
    version: str
    runtime_library: Path

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    @property
    def link_arguments(self) -> list[str]:
        """Linker arguments for the CUDA runtime; by file name, as pip's toolkit has only `libcudart.so.13`."""
        return [f"-L{self.runtime_library.parent}", f"-l:{self.runtime_library.name}"]


def wanted(environment: Mapping[str, str] = os.environ) -> str:
    """Return GRADFAST_CUDA: "auto" (default), "0" or "1"; `SystemExit` on anything else."""
    value = environment.get("GRADFAST_CUDA", "").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"gradfast: GRADFAST_CUDA must be auto, 0 or 1, not {value!r}")
    return value


def choose(torch_cuda: str | None, torch_hip: str | None = None) -> tuple[Toolkit | None, str]:
    """Decide whether to build CUDA: the toolkit to use or None, and the reason in a few words.

    Args:
        torch_cuda: `torch.version.cuda`, such as "13.0", or None for a torch without CUDA.
        torch_hip: `torch.version.hip`, or None.

    Raises:
        SystemExit: GRADFAST_CUDA=1 and there is no toolkit to build with, or GRADFAST_CUDA is not auto, 0 or 1.
    """
    choice = wanted()
    if choice == "0":
        return None, "GRADFAST_CUDA=0"
    if torch_hip:
        toolkit, reason = None, "this torch is built for ROCm, which gradfast does not support"
    elif not torch_cuda:
        toolkit, reason = None, "this torch is built without CUDA"
    else:
        toolkit, reason = find(int(torch_cuda.partition(".")[0]))
    if toolkit is None and choice == "1":
        raise SystemExit(f"gradfast: GRADFAST_CUDA=1, but CUDA can't be built: {reason}")
    return toolkit, reason


def find(major: int) -> tuple[Toolkit | None, str]:
    """Return the first toolkit of CUDA `major` that is found, and where; or None, and what was found instead."""
    unsuitable, incomplete = [], []
    for root in dict.fromkeys(candidate_roots(major)):
        toolkit, reason = inspect(root)
        if toolkit is None:
            incomplete.append(f"{root}: {reason}")
        elif toolkit.major != major:
            unsuitable.append(f"{root} is CUDA {toolkit.version}")
        elif complaint := complaint_of(toolkit):
            unsuitable.append(f"{root}: {complaint}")
        else:
            return toolkit, f"toolkit {toolkit.version} in {toolkit.root}"
    found = "; ".join(unsuitable or incomplete) or "no nvcc on PATH, no CUDA_HOME, nothing in /usr/local"
    return None, f"no CUDA {major} toolkit ({found})"


def candidate_roots(major: int) -> Iterator[Path]:
    """Yield folders that may be toolkit roots: what the user named, what PATH has, then the customary places."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    if nvcc := shutil.which("nvcc"):
        yield from roots_behind(Path(nvcc))
    yield from customary_places(major)


def customary_places(major: int) -> Iterator[Path]:
    """Yield the toolkits that conda, NVIDIA's installers, a distribution or pip may have left."""
    if os.environ.get("CONDA_PREFIX"):
        yield from having_nvcc(Path(os.environ["CONDA_PREFIX"]))
    local = Path("/usr/local")
    versions = sorted(local.glob(f"cuda-{major}.*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    for root in (local / "cuda", *reversed(versions), local / f"cuda-{major}", Path("/opt/cuda")):
        yield from having_nvcc(root)
    yield from pip_roots(major)


def roots_behind(nvcc: Path) -> Iterator[Path]:
    """Yield the root that `nvcc` itself reports, then the one its place suggests.

    The `nvcc` on PATH is often a wrapper script or a link in another folder, so its parent says nothing; a dry run
    makes the real one print its own: `#$ TOP=/usr/local/cuda-13.0/bin/..`.
    """
    try:
        dry_run = subprocess.run(
            [str(nvcc), "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True, timeout=60
        )
        for line in (dry_run.stderr + dry_run.stdout).splitlines():
            if line.startswith("#$ TOP="):
                yield Path(line.partition("=")[2]).resolve()
    except (OSError, subprocess.TimeoutExpired):
        pass
    yield nvcc.resolve().parent.parent
    yield nvcc.parent.parent


def having_nvcc(root: Path) -> Iterator[Path]:
    """Yield `root` if it has a compiler: an absent customary place is not worth a word."""
    if (root / "bin" / "nvcc").is_file():
        yield root.resolve()


def pip_roots(major: int) -> Iterator[Path]:
    """Yield the toolkit that pip's `nvidia-*` packages make up beside torch, from CUDA 13 on."""
    import importlib.util

    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        yield from having_nvcc(Path(folder) / f"cu{major}")


def inspect(root: Path) -> tuple[Toolkit | None, str]:
    """Return the toolkit at `root`, or None and what it lacks."""
    nvcc = root / "bin" / "nvcc"
    if not nvcc.is_file():
        return None, "no bin/nvcc"
    try:
        output = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvcc does not run ({error})"
    version = re.search(r"release (\d+\.\d+)", output)
    if version is None:
        return None, "nvcc does not say its version"
    if not any((root / folder / "cuda_runtime_api.h").is_file() for folder in header_folders()):
        return None, "no cuda_runtime_api.h (toolkit headers are missing)"
    library = find_runtime_library(root)
    if library is None:
        return None, "no libcudart.so"
    return Toolkit(root, version[1], library), ""


def complaint_of(toolkit: Toolkit) -> str | None:
    """Return why `toolkit` can't compile on this machine, or None: it compiles an empty file, in a second or so.

    Each toolkit knows g++ up to a version; and pip's can be put together from packages that do not fit each other.
    """
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []  # as torch's cpp_extension does
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        command = [str(toolkit.nvcc), "-std=c++20", *host, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nvcc does not run ({error})"
    if result.returncode == 0:
        return None
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    telling = (line for line in lines if "error" in line.lower() or "fatal" in line.lower())
    return f"nvcc fails: {next(telling, lines[0] if lines else 'no message')}"


def header_folders() -> tuple[str, ...]:
    """Folders under a root that may hold the CUDA headers (the second is conda's)."""
    return ("include", f"targets/{os.uname().machine}-linux/include", "targets/sbsa-linux/include")


def find_runtime_library(root: Path) -> Path | None:
    """Return the shared CUDA runtime library to link against: `libcudart.so`, or pip's versioned one."""
    machine = os.uname().machine
    folders = ("lib64", "lib", f"targets/{machine}-linux/lib", "targets/sbsa-linux/lib", f"lib/{machine}-linux-gnu")
    for name in ("libcudart.so", "libcudart.so.*"):
        for folder in folders:
            for library in sorted((root / folder).glob(name)):
                return library
    return None


def architectures(toolkit: Toolkit) -> str:
    """Return the architectures to compile for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX".

    TORCH_CUDA_ARCH_LIST is honoured; "native" there means those of the GPUs in this machine. Unset, the default is
    every architecture from Ampere on that the toolkit knows, so that a build made on one machine runs on all.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked and asked.lower() != "native":
        return ";".join(re.split(r"[;,\s]+", asked))
    known = known_architectures(toolkit)
    if asked:
        return native_architectures(known, visible_capabilities())
    supported = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture in known]
    if not supported:
        raise SystemExit(
            f"gradfast: the toolkit in {toolkit.root} compiles for none of {', '.join(DEFAULT_ARCHITECTURES)}; "
            "set TORCH_CUDA_ARCH_LIST to what it can compile for"
        )
    return ";".join(supported) + "+PTX"


def known_architectures(toolkit: Toolkit) -> list[str]:
    """Return the architectures that the toolkit compiles for, ascending: "7.5", "8.0", ... "12.0"."""
    command = [str(toolkit.nvcc), "--list-gpu-arch"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    return [f"{number // 10}.{number % 10}" for number in sorted(map(int, re.findall(r"compute_(\d+)\b", listing)))]


def visible_capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the GPUs that torch sees here."""
    import torch

    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def native_architectures(known: list[str], capabilities: list[tuple[int, int]]) -> str:
    """Return the architectures for GPUs of the given capabilities; `SystemExit` without one.

    A GPU newer than the toolkit gets the newest code that the toolkit can make, which it compiles from PTX.
    """
    if not capabilities:
        raise SystemExit("gradfast: TORCH_CUDA_ARCH_LIST=native, but no GPU is visible: name the architectures instead")
    chosen = []
    for capability in sorted(set(capabilities)):
        older = [name for name in known if tuple(map(int, name.split("."))) <= capability]
        if not older:
            raise SystemExit(
                f"gradfast: the CUDA toolkit has nothing for compute capability {'.'.join(map(str, capability))}; "
                "set GRADFAST_CUDA=0"
            )
        chosen.append(older[-1])
    return ";".join(dict.fromkeys(chosen)) + "+PTX"
