"""`make gpu-check`: everything that only a GPU can show, in one go, on a machine that may have no network.

    python tests/gpu/gpu_check.py [--limit SECONDS] [--output FOLDER]

Needs a Python with a CUDA build of torch, setuptools and pytest, and a CUDA toolkit; installs nothing and downloads
nothing. Stages: the machine; the extension, built in place; `pytest -m cuda`; the kernels' own test program, built and
run on the GPU; compute-sanitizer's memcheck, racecheck and synccheck over that program; `gradfast bench`.

A stage that fails, hangs, or cannot run here does not keep the others from running unless they need what it made, and
each says why it did not run. Each has a time of its own, cut where those behind it would be left with too little.
FOLDER gets report.json and report.md, rewritten after every stage, and each stage's output; the exit code is 1 where a
stage failed. Interrupted or terminated, it stops what is running and still writes its report.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import targets

ROOT = Path(__file__).resolve().parents[2]
DEVICE_TEST = Path("build", "device-test-gpu", "device_test")
USUAL = 450.0  # seconds for everything
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
    share: float = 1.0  # of the usual time, that every stage has
    stages: list[Stage] = field(default_factory=list)
    machine: dict[str, object] = field(default_factory=dict)
    stage_end: float = 0.0  # of the stage under way
    interrupted: bool = False

    def stage(
        self, name: str, run: Callable[[], str], needs: Sequence[str] = (), at_most: float = 60.0, reserve: float = 0.0
    ) -> None:
        """Run one stage, unless one that it needs did not pass.

        Args:
            run: returns a note. What it raises is the stage's failure, and ends no other stage.
            at_most: seconds that it may take, and
            reserve: seconds that are kept for the stages behind it, where the whole has its usual time.
        """
        stage = Stage(name)
        self.stages.append(stage)
        print(f"==== {name}", flush=True)
        start = time.monotonic()
        self.stage_end = min(start + at_most * self.share, self.deadline - reserve * self.share)
        try:
            for needed in needs:
                if not any(other.name == needed and other.outcome == "passed" for other in self.stages):
                    raise Skip(f"needs {needed!r}, which did not pass")
            if self.interrupted:
                raise Skip("interrupted before it")
            if self.left() < 1:
                raise Skip("the time limit was reached")
            stage.note = run()
            stage.outcome = "passed"
        except Skip as reason:
            stage.outcome, stage.note = "skipped", str(reason)
        except Failure as reason:
            stage.outcome, stage.note = "failed", str(reason)
        except (Exception, SystemExit) as error:  # of a stage's own code: a file that is not there, say
            stage.outcome, stage.note = "failed", f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            stage.outcome, stage.note = "failed", "interrupted"
            self.interrupted = True
        stage.seconds = round(time.monotonic() - start, 1)
        print(f"     {stage.outcome} in {stage.seconds:.0f} s: {stage.note}", flush=True)
        self.write()

    def left(self) -> float:
        """Seconds that the stage under way may still take."""
        return self.stage_end - time.monotonic()

    def call(self, log: str, command: Sequence[str], environment: dict[str, str] | None = None) -> str:
        """Run a command, its output into `log`, as long as the stage may take; return the output."""
        path = self.output / log
        limit = max(1.0, self.left())
        with path.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise Failure(f"stopped after {limit:.0f} s; {last_line(path)}; see {log}") from None
            finally:
                stop_all(process)
        if code != 0:
            raise Failure(f"exit code {code}; {last_line(path)}; see {log}")
        return path.read_text(errors="replace")

    def benchmark(self) -> dict[str, object] | None:
        path = self.output / "bench.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self) -> None:
        """Write report.json and report.md as they stand."""
        stages = [asdict(stage) for stage in self.stages]
        benchmark = self.benchmark()
        if benchmark is not None:
            self.machine["copy_gb_per_second"] = round(float(str(benchmark["copy_bytes_per_second"])) / 1e9, 1)
        reached = [asdict(target) for target in targets.judge(benchmark)]
        report = {
            "schema": 2,
            "machine": self.machine,
            "stages": stages,
            "targets": reached,
            "benchmark": benchmark,
        }
        (self.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (self.output / "report.md").write_text(self.markdown())

    def markdown(self) -> str:
        what = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [f"gradfast on {what or 'a machine that could not be looked at'}", ""]
        lines += ["| stage | outcome | seconds | |", "| --- | --- | --- | --- |"]
        lines += [f"| {s.name} | {s.outcome} | {s.seconds:.0f} | {s.note.replace('|', '/')} |" for s in self.stages]
        lines += ["", "| target of an H100 | bound | found | |", "| --- | --- | --- | --- |"]
        lines += [f"| {t.what} | {t.bound} | {t.shown} | {t.verdict} |" for t in targets.judge(self.benchmark())]
        table = self.output / "bench.md"
        return "\n".join([*lines, "", table.read_text() if table.exists() else ""])


def stop_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all that it started: a compiler left behind would take the next stages' time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    check.call("build.log", [sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    return str(json.loads((ROOT / "gradfast" / "_build.json").read_text())["summary"])


def build_device_test(check: Check) -> str:
    nvcc = find_nvcc()
    check.call("build-device-test.log", ["make", "-C", "tests/device", "gpu", f"NVCC={nvcc}"])
    return str(nvcc)


def find_nvcc() -> Path:
    """The compiler that the extension was built with."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "build_backend"))
    import torch

    import cuda_toolkit

    toolkit, reason = cuda_toolkit.choose(torch.version.cuda)
    if toolkit is None:
        raise Skip(reason)
    return toolkit.nvcc


def run_device_test(check: Check) -> str:
    check.call("device-test.log", [str(ROOT / DEVICE_TEST)])
    return last_line(check.output / "device-test.log")


def run_pytest(check: Check) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise Skip(f"pytest is not installed for {sys.executable}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *places_of_cuda_tests()]
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout") is None:  # the configuration names an option of it
        command += ["-o", "addopts=-ra --strict-markers --import-mode=importlib"]
    check.call("pytest.log", command, with_sources_on_path())
    return last_line(check.output / "pytest.log")


def with_sources_on_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def places_of_cuda_tests() -> list[str]:
    """tests/gpu, and each file elsewhere with a test that is marked: their neighbours may need packages not here."""
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if is_marked(path)}
    return sorted({"tests/gpu"} | {path for path in marked if not path.startswith("tests/gpu")})


def is_marked(path: Path) -> bool:
    return "mark.cuda" in path.read_text()


def sanitize(check: Check, tool: str) -> str:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise Skip("no compute-sanitizer on PATH, beside nvcc or in /usr/local/cuda/bin")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", str(ROOT / DEVICE_TEST), "step", "mixed"]
    log = check.output / f"{tool}.log"
    try:
        check.call(log.name, command)
    except Failure:
        if log.exists() and "Device not supported" in log.read_text(errors="replace"):
            raise Skip("compute-sanitizer does not support this device, or the driver beneath it") from None
        raise
    summaries = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if "SUMMARY" in line]
    return summaries[-1] if summaries else last_line(log)


def find_sanitizer() -> str | None:
    with contextlib.suppress(Skip):
        if found := shutil.which("compute-sanitizer", path=str(find_nvcc().parent)):
            return found
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run_benchmark(check: Check) -> str:
    # What is left, less what a comparison under way may take when the benchmark's own limit is reached.
    limit = max(check.left() - 35 * check.share, 1)
    command = [sys.executable, "-m", "gradfast", "bench", "--device", "cuda", "--output", str(check.output)]
    command += ["--workload", *targets.WORKLOADS, "--peer", "torch-fused", "torch-unclipped", "torch-scaled"]
    command += ["--processes", "1", "--pairs", "30", "--seconds", "0.5", "--limit", f"{limit:.0f}"]
    check.call("bench.log", command, with_sources_on_path())
    report = check.benchmark()
    if report is None:
        raise Failure("wrote no bench.json; see bench.log")
    return f"copy bandwidth {float(str(report['copy_bytes_per_second'])) / 1e9:.0f} GB/s"


def run_all(check: Check) -> None:
    """Every stage in its order. Together the reserves leave the benchmark a minute and a half, whatever happens."""
    test = "build the kernels' test"
    check.stage("machine", lambda: look_at_machine(check), at_most=60)
    check.stage("build", lambda: build_extension(check), needs=["machine"], at_most=240, reserve=150)
    check.stage("pytest -m cuda", lambda: run_pytest(check), needs=["build"], at_most=150, reserve=130)
    check.stage(test, lambda: build_device_test(check), needs=["machine"], at_most=120, reserve=110)
    check.stage("the kernels' test", lambda: run_device_test(check), needs=[test], at_most=60, reserve=100)
    for tool in SANITIZERS:
        check.stage(tool, lambda tool=tool: sanitize(check, tool), needs=[test], at_most=45, reserve=90)
    check.stage("benchmark", lambda: run_benchmark(check), needs=["build"], at_most=180)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Whoever runs this may end it by SIGTERM: what is running is stopped, and the report written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=USUAL, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    output = given.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    for stale in ("bench.json", "bench.md", "bench.png"):
        (output / stale).unlink(missing_ok=True)
    check = Check(output, time.monotonic() + given.limit, given.limit / USUAL)
    with termination_as_interrupt():
        run_all(check)
    print("\n" + check.markdown())
    failed = [stage.name for stage in check.stages if stage.outcome == "failed"]
    print(f"FAILED: {', '.join(failed)}" if failed else "nothing failed", f"; written to {output}", sep="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
