"""`gradfast info`, and that only torch's own OpenMP runtime is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradfast import info
from gradfast._load import native
from gradfast.version import __version__


def run(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "gradfast.info", *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_table_has_what_a_bug_report_needs() -> None:
    rows = dict(line.split(maxsplit=1) for line in run().splitlines() if not line.startswith("built for"))
    assert rows["gradfast"].startswith(__version__)
    assert rows["torch"].startswith(str(torch.__version__))
    assert rows["cpu"].split()[0] == native.cpu_capability()
    assert ("built with toolkit" in rows["cuda"]) == native.cuda_built()
    assert "gpu" in rows


def test_json_holds_the_same() -> None:
    found = json.loads(run("--json"))
    assert found["gradfast"] == __version__
    assert found["torch"] == found["built_for_torch"] == str(torch.__version__)
    assert found["cpu_capability"] in ("avx512", "avx2", "default")
    assert found["threads"] >= 1
    assert found["cuda_built"] is native.cuda_built()
    assert bool(found["cuda_architectures"]) == found["cuda_built"]
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_reason_for_a_build_without_cuda_is_shown() -> None:
    collected = {
        **info.collect(),
        "cuda_built": False,
        "build": "gradfast: built for torch 2.13.0: CPU only, no CUDA: X",
    }
    assert "not built (X)" in info.table(collected)


def test_gpus_are_listed() -> None:
    gpu = {"index": 0, "name": "H100", "capability": "9.0", "memory_bytes": 80 * 2**30, "multiprocessors": 132}
    shown = info.table({**info.collect(), "gpus": [gpu]})
    assert "0: H100, compute capability 9.0, 80 GiB, 132 multiprocessors" in shown


def test_runtimes_are_told_from_other_libraries() -> None:
    maps = """\
7f0000000000-7f0000001000 r-xp 00000000 08:01 1                  /usr/lib/libgomp.so.1.0.0
7f0000001000-7f0000002000 r--p 00001000 08:01 1                  /usr/lib/libgomp.so.1.0.0
7f0000002000-7f0000003000 r-xp 00000000 08:01 2                  /a folder/libiomp5.so
7f0000003000-7f0000004000 r-xp 00000000 08:01 3                  /usr/lib/libompstuff.so
7f0000004000-7f0000005000 r-xp 00000000 08:01 4                  /torch.libs/libgomp-24e2ab19.so.1.0.0
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
"""
    assert info.openmp_runtimes(maps) == [
        "/a folder/libiomp5.so",
        "/torch.libs/libgomp-24e2ab19.so.1.0.0",
        "/usr/lib/libgomp.so.1.0.0",
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc to count them in")
def test_one_openmp_runtime_is_loaded_and_it_is_that_of_torch() -> None:
    """A second runtime in the process would be a second pool of threads, competing with torch's for the cores."""
    code = """
import torch
from gradfast.info import openmp_runtimes
before = openmp_runtimes()
import gradfast
parameter = torch.nn.Parameter(torch.ones(1_000_000))
parameter.grad = torch.ones_like(parameter)
gradfast.SGD([parameter], lr=0.1, max_norm=1.0).step()
print(before == openmp_runtimes(), len(before), before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("True 1 "), result.stdout + result.stderr


def test_extension_does_not_ask_for_an_openmp_runtime_of_its_own() -> None:
    """It takes the GOMP symbols from the runtime that libtorch_cpu loads: no library name of one is in its needs."""
    assert native.__file__ is not None
    content = Path(native.__file__).read_bytes()
    assert b"GOMP_parallel\0" in content  # so it is compiled with OpenMP
    assert b"libgomp.so" not in content
    assert b"libomp.so" not in content


def test_cuda_build_imports_without_a_driver() -> None:
    """No library of the driver is loaded by importing: a machine without a GPU uses the CPU path of a CUDA build."""
    code = """
import gradfast
print(gradfast._load.native.cuda_built(), "libcuda.so" in open("/proc/self/maps").read())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    if not torch.cuda.is_available():
        assert result.stdout.split() == [str(native.cuda_built()), "False"]
