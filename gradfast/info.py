"""`gradfast info`: what is installed here, and what it runs on.

Made to be pasted into a bug report. Nothing is imported for it but torch and the native extension.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradfast._load import native, read_record
from gradfast.version import __version__

_OPENMP = re.compile(r"/(lib(?:gomp|iomp5|omp)\b[^/]*)$")


def openmp_runtimes(maps: str | None = None) -> list[str]:
    """Return the paths of the OpenMP runtimes loaded in this process: exactly one, if all is well.

    Args:
        maps: the text of `/proc/self/maps` (the default where there is one, as on Linux).
    """
    if maps is None:
        path = Path("/proc/self/maps")
        maps = path.read_text() if path.exists() else ""
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    return sorted(path for path in paths if _OPENMP.search(path))


def collect() -> dict[str, Any]:
    """Return what `gradfast info` shows, as plain values that JSON can hold."""
    return {
        "gradfast": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "built_for_torch": read_record()["torch"],
        "cpu_capability": native.cpu_capability(),
        "threads": torch.get_num_threads(),
        "openmp": openmp_runtimes(),
        "cuda_built": native.cuda_built(),
        "cuda_toolkit": read_record().get("cuda_toolkit"),
        "cuda_architectures": [name for name in native.cuda_architectures().split(";") if name],
        "build": read_record().get("summary", ""),
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, Any]]:
    """Describe the GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def table(info: dict[str, Any]) -> str:
    """Lay out what `collect` returned as lines of a name and a value."""
    cuda = "not built" + _reason(info["build"])
    if info["cuda_built"]:
        cuda = f"built with toolkit {info['cuda_toolkit']} for {', '.join(info['cuda_architectures'])}"
    gpus = [
        f"{gpu['index']}: {gpu['name']}, compute capability {gpu['capability']}, "
        f"{gpu['memory_bytes'] / 2**30:.0f} GiB, {gpu['multiprocessors']} multiprocessors"
        for gpu in info["gpus"]
    ]
    runtimes = [Path(path).name for path in info["openmp"]]
    if len(runtimes) > 1:
        runtimes.append("(more than one: threads will compete for cores)")
    rows = {
        "gradfast": f"{info['gradfast']} in {info['location']}",
        "python": f"{info['python']} on {info['platform']}",
        "torch": f"{info['torch']} (CUDA {info['torch_cuda']})" if info["torch_cuda"] else info["torch"],
        "built for": f"torch {info['built_for_torch']}",
        "cpu": f"{info['cpu_capability']} instructions, {info['threads']} threads",
        "openmp": " ".join(runtimes) or "none",
        "cuda": cuda,
        "gpu": "; ".join(gpus) or "none seen by torch",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def _reason(build: str) -> str:
    """Return why the build left CUDA out, from its one-line summary."""
    _, found, reason = build.partition("no CUDA: ")
    return f" ({reason})" if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gradfast info`."""
    parser = argparse.ArgumentParser(prog="gradfast info", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    arguments = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else table(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
