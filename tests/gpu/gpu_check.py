"""`make gpu-check`: everything that only a GPU can show, in one go, on a machine that may have no network.

    python tests/gpu/gpu_check.py [--limit SECONDS] [--output FOLDER]

Needs a Python with a CUDA build of torch, setuptools and pytest, and a CUDA toolkit; installs nothing and downloads
nothing. Stages: the machine; the extension, built in place; `pytest -m cuda`; the kernels' own test program, built and
run on the GPU; compute-sanitizer's memcheck, racecheck and synccheck over that program; `gradfast bench`.

A stage that fails, or that the time limit cuts off, does not keep the others from running unless they need what it
made, and each says why it did not run. FOLDER gets report.json and report.md, rewritten after every stage, and each
stage's output; the exit code is 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICE_TEST = ROOT / "build" / "device-test-gpu" / "device_test"
SANITIZERS = ("memcheck", "racecheck", "synccheck")


class Skip(Exception):  # noqa: N818  nothing went wrong
    """A stage that cannot run here; the message says why."""


class Failure(Exception):  # noqa: N818  reads as what it says
    """A stage that ran and failed; the message says how."""


@dataclass
class Stage:
    """What became of one stage."""

    name: str
    outcome: str = "not reached"  # passed, failed, skipped
    seconds: float = 0.0
    note: str = ""


@dataclass
class Check:
    """The whole run: its stages so far, and where they are written."""

    output: Path
    deadline: float
    stages: list[Stage] = field(default_factory=list)
    machine: dict[str, object] = field(default_factory=dict)

    def stage(self, name: str, run: Callable[[], str], needs: Sequence[str] = ()) -> None:
        """Run one stage unless one that it needs did not pass; `run` returns a note."""
        stage = Stage(name)
        self.stages.append(stage)
        print(f"==== {name}", flush=True)
        start = time.monotonic()
        try:
            for needed in needs:
                if not any(other.name == needed and other.outcome == "passed" for other in self.stages):
                    raise Skip(f"needs {needed!r}, which did not pass")
            if self.left() < 5:
                raise Skip("the time limit was reached")
            stage.note = run()
            stage.outcome = "passed"
        except Skip as reason:
            stage.outcome, stage.note = "skipped", str(reason)
        except Failure as reason:
            stage.outcome, stage.note = "failed", str(reason)
        stage.seconds = round(time.monotonic() - start, 1)
        print(f"     {stage.outcome} in {stage.seconds:.0f} s: {stage.note}", flush=True)
        self.write()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def call(self, log: str, command: Sequence[str], at_most: float, environment: dict[str, str] | None = None) -> str:
        """Run a command, its output into `log`, for at most so many seconds; return the output."""
        path = self.output / log
        limit = max(1.0, min(at_most, self.left()))
        with path.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise Failure(f"stopped after {limit:.0f} s; {last_line(path)}") from None
        if code != 0:
            raise Failure(f"exit code {code}; {last_line(path)}; see {log}")
        return path.read_text(errors="replace")

    def benchmark(self) -> dict[str, object] | None:
        path = self.output / "bench.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self) -> None:
        """Write report.json and report.md as they stand."""
        stages = [asdict(stage) for stage in self.stages]
        report = {"schema": 1, "machine": self.machine, "stages": stages, "benchmark": self.benchmark()}
        (self.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (self.output / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        what = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"gradfast on {what}", "", "| stage | outcome | seconds | |", "| --- | --- | --- | --- |"]
        lines += [f"| {s.name} | {s.outcome} | {s.seconds:.0f} | {s.note.replace('|', '/')} |" for s in self.stages]
        table = self.output / "bench.md"
        return "\n".join([*lines, "", table.read_text() if table.exists() else ""])


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


# ---- the stages --------------------------------------------------------------------------------------------------


def look_at_machine(check: Check) -> str:
    try:
        import torch
    except ImportError as error:
        raise Failure(f"{sys.executable} has no torch ({error})") from error
    if not torch.cuda.is_available():
        raise Failure(f"torch {torch.__version__} sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    check.machine.update(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_gib=round(properties.total_memory / 2**30, 1),
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda),
        python=sys.version.split()[0],
        driver=driver_version(),
    )
    return str(properties.name)


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def build_extension(check: Check) -> str:
    # By setup.py and not by pip, which would want an environment that it may write to.
    environment = {"GRADFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or "native"}
    check.call("build.log", [sys.executable, "setup.py", "build_ext", "--inplace"], 240, environment)
    return str(json.loads((ROOT / "gradfast" / "_build.json").read_text())["summary"])


def build_device_test(check: Check) -> str:
    nvcc = find_nvcc()
    check.call("build-device-test.log", ["make", "-C", "tests/device", "gpu", f"NVCC={nvcc}"], 180)
    return nvcc


def find_nvcc() -> str:
    """The compiler that the extension was built with."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    import torch

    import cuda_toolkit

    toolkit, reason = cuda_toolkit.choose(torch.version.cuda)
    if toolkit is None:
        raise Skip(reason)
    return str(toolkit.nvcc)


def run_device_test(check: Check) -> str:
    return check.call("device-test.log", [str(DEVICE_TEST)], 90).strip().splitlines()[-1]


def run_pytest(check: Check) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise Skip(f"pytest is not installed for {sys.executable}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *folders_with_cuda_tests()]
    if importlib.util.find_spec("pytest_timeout") is None:  # the configuration names an option of it
        command += ["-o", "addopts=-ra --strict-markers --import-mode=importlib"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return check.call("pytest.log", command, 180, environment).strip().splitlines()[-1]


def folders_with_cuda_tests() -> list[str]:
    """Those of tests/ with a test that is marked: others may need packages that are not here."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    return sorted({str(path.parent.relative_to(ROOT)) for path in marked} | {"tests/gpu"})


def sanitize(check: Check, tool: str) -> str:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        raise Skip("no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", str(DEVICE_TEST), "step", "mixed"]
    output = check.call(f"{tool}.log", command, 50)
    summaries = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
    return summaries[-1] if summaries else last_line(check.output / f"{tool}.log")


def run_benchmark(check: Check) -> str:
    limit = check.left() - 10
    command = [sys.executable, "-m", "gradfast", "bench", "--device", "cuda", "--output", str(check.output)]
    command += ["--processes", "1", "--pairs", "30", "--seconds", "0.5", "--limit", f"{max(limit - 15, 1):.0f}"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    check.call("bench.log", command, limit, environment)
    report = check.benchmark()
    assert report is not None
    check.machine["copy_gb_per_second"] = round(float(str(report["copy_bytes_per_second"])) / 1e9, 1)
    return f"copy bandwidth {check.machine['copy_gb_per_second']} GB/s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=450.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    output = given.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    for stale in ("bench.json", "bench.md", "bench.png"):
        (output / stale).unlink(missing_ok=True)
    check = Check(output, time.monotonic() + given.limit)
    check.stage("machine", lambda: look_at_machine(check))
    check.stage("build", lambda: build_extension(check), needs=["machine"])
    check.stage("pytest -m cuda", lambda: run_pytest(check), needs=["build"])
    check.stage("build the kernels' test", lambda: build_device_test(check), needs=["machine"])
    check.stage("the kernels' test", lambda: run_device_test(check), needs=["build the kernels' test"])
    for tool in SANITIZERS:
        check.stage(tool, lambda tool=tool: sanitize(check, tool), needs=["build the kernels' test"])
    check.stage("benchmark", lambda: run_benchmark(check), needs=["build"])
    print("\n" + check.markdown())
    print(f"written to {output}")
    return 1 if any(stage.outcome == "failed" for stage in check.stages) else 0


if __name__ == "__main__":
    sys.exit(main())
