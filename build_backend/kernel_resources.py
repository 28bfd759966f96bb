"""Compile every CUDA kernel for every architecture and show what each takes of a GPU; fail where one spills registers.

    python build_backend/kernel_resources.py [--cuda 12] [--architectures 8.0 9.0]

A kernel that needs more registers than it was given keeps some in memory, which costs the bandwidth that it is there to
save. The assembler tells (`-Xptxas -v`); from registers follows the occupancy, how much of a multiprocessor's warps are
resident together. Needs a CUDA toolkit and no GPU; two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
WARP = 32
REGISTERS = 65_536  # of a multiprocessor, from compute capability 8.0 to 12.0; handed out to warps 256 at a time
# Warps and blocks that a multiprocessor holds at most (CUDA C++ Programming Guide, compute capabilities).
LIMITS = {"8.0": (64, 32), "8.6": (48, 16), "8.9": (48, 24), "9.0": (64, 32), "10.0": (64, 32), "12.0": (48, 24)}

_COMPILING = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass
class Function:
    """A kernel, or a device function that kernels call, as compiled for one architecture."""

    name: str
    architecture: str
    kernel: bool
    stack_bytes: int = 0
    spilled_bytes: int = 0  # stores and loads
    registers: int = 0


def parse(text: str) -> list[Function]:
    """Read what ptxas wrote about each function."""
    functions: list[Function] = []
    kernel, architecture = "", ""
    for line in text.splitlines():
        if match := _COMPILING.search(line):
            kernel, architecture = match[1], f"{int(match[2]) // 10}.{int(match[2]) % 10}"
        elif match := _PROPERTIES.search(line):
            functions.append(Function(match[1], architecture, match[1] == kernel))
        elif match := _SPILLS.search(line):
            functions[-1].stack_bytes = int(match[1])
            functions[-1].spilled_bytes = int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            # Of the entry function, also where functions that it calls stand between.
            next(f for f in reversed(functions) if f.name == kernel).registers = int(match[1])
    return functions


def resident_blocks(registers: int, architecture: str, threads: int) -> int:
    """Blocks of a kernel that a multiprocessor holds, as far as registers, warps and blocks limit them."""
    warps = threads // WARP
    most_warps, most_blocks = LIMITS[architecture]
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256) // warps if registers else most_blocks
    return min(by_registers, most_warps // warps, most_blocks)


def threads_per_block() -> int:
    """`kThreads` of csrc/cuda/table.h."""
    text = (ROOT / "csrc" / "cuda" / "table.h").read_text()
    match = re.search(r"kThreads = (\d+)", text)
    if match is None:
        raise SystemExit("gradfast: csrc/cuda/table.h has no kThreads")
    return int(match[1])


def compile_one(nvcc: Path, source: Path, architectures: Sequence[str]) -> str:
    """Compile one source for all architectures; return what the compiler wrote."""
    numbers = [architecture.replace(".", "") for architecture in architectures]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *targets, "-Xptxas=-v", "-c", str(source)]
        result = subprocess.run([*command, "-o", str(Path(folder, "out.o"))], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"gradfast: {source.name} does not compile:\n{result.stderr}")
    return result.stderr + result.stdout


def readable(names: Sequence[str]) -> list[str]:
    """Demangle, and leave away what all names share; the names as they are where there is no c++filt."""
    try:
        result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return list(names)
    shortened = []
    for name in result.stdout.splitlines():
        name = re.sub(r"_INTERNAL_\w+?::|\(anonymous namespace\)::|gradfast::(cuda::)?|^void ", "", name)
        shortened.append(re.sub(r"\((?!bool|int|long|\d).*", "", name))
    return shortened


def table(functions: Sequence[Function], threads: int) -> str:
    """One line a kernel and architecture, in Markdown."""
    kernels = [function for function in functions if function.kernel]
    lines = ["| kernel | architecture | registers | stack | blocks | occupancy |", "|---|---|---|---|---|---|"]
    for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels])):
        blocks = resident_blocks(kernel.registers, kernel.architecture, threads)
        occupancy = blocks * threads // WARP / LIMITS[kernel.architecture][0]
        cells = [name, kernel.architecture, kernel.registers, kernel.stack_bytes, blocks, f"{occupancy:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def find_toolkit(majors: Sequence[int]) -> tuple[cuda_toolkit.Toolkit | None, str]:
    """Return the toolkit of the first version that is here, and where it is; or None, and why not the first."""
    found = [cuda_toolkit.find(major) for major in majors]
    return next((one for one in found if one[0]), found[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--cuda", type=int, choices=(12, 13), help="major version of the toolkit; CUDA_HOME finds it")
    given = parser.parse_args(arguments)
    toolkit, reason = find_toolkit((given.cuda,) if given.cuda else (13, 12))
    if toolkit is None:
        print(f"gradfast: the kernels' resources are not checked: {reason}")
        return 1 if cuda_toolkit.wanted() == "1" else 0
    known = cuda_toolkit.known_architectures(toolkit)
    architectures = [architecture for architecture in given.architectures if architecture in known]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        written = pool.map(lambda source: compile_one(toolkit.nvcc, source, architectures), sources)
        functions = [function for text in written for function in parse(text)]
    print(table(functions, threads_per_block()))
    kernels = sum(function.kernel for function in functions)
    print(f"\n{kernels} kernels with CUDA {toolkit.version} for {', '.join(architectures)}; {reason}")
    if not kernels:
        raise SystemExit("gradfast: nvcc told of no kernel; has the form of its messages changed?")
    spilling = [function for function in functions if function.spilled_bytes]
    for function, name in zip(spilling, readable([function.name for function in spilling])):
        print(f"SPILLS {function.spilled_bytes} bytes: {name} for {function.architecture}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
