"""`make gpu-check` where there is no GPU: its stages, what it keeps of them, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import gpu_check, targets
from gpu.gpu_check import Check, Failure, Skip


def stages(folder: Path) -> dict[str, tuple[str, str]]:
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == {"schema", "machine", "stages", "targets", "benchmark"}
    return {stage["name"]: (stage["outcome"], stage["note"]) for stage in report["stages"]}


def test_each_stage_is_kept_whatever_becomes_of_the_next(tmp_path: Path) -> None:
    def fails() -> str:
        raise Failure("exit code 3")

    def skips() -> str:
        raise Skip("no compute-sanitizer")

    check = Check(tmp_path, time.monotonic() + 60)
    check.stage("first", lambda: "fine")
    assert stages(tmp_path) == {"first": ("passed", "fine")}
    check.stage("second", fails)
    check.stage("third", skips, needs=["first"])
    check.stage("fourth", lambda: pytest.fail("ran"), needs=["second"])
    check.stage("fifth", lambda: "also fine", needs=["first"])
    assert stages(tmp_path) == {
        "first": ("passed", "fine"),
        "second": ("failed", "exit code 3"),
        "third": ("skipped", "no compute-sanitizer"),
        "fourth": ("skipped", "needs 'second', which did not pass"),
        "fifth": ("passed", "also fine"),
    }
    assert "| third | skipped | 0 | no compute-sanitizer |" in (tmp_path / "report.md").read_text()


def test_time_limits(tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() + 60)
    code = "print('so far', flush=True); import time; time.sleep(60)"
    check.stage("slow", lambda: check.call("slow.log", [sys.executable, "-c", code]), at_most=3)
    check.deadline = time.monotonic() + 60
    check.stage("gives way", lambda: pytest.fail("ran"), reserve=59.5)
    check.stage("may run", lambda: "in what was reserved")
    assert stages(tmp_path) == {
        "slow": ("failed", "stopped after 3 s; so far; see slow.log"),
        "gives way": ("skipped", "the time limit was reached"),
        "may run": ("passed", "in what was reserved"),
    }


def test_a_failing_command_tells_its_last_line_and_its_log(tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() + 60)
    check.stage("bad", lambda: check.call("bad.log", [sys.executable, "-c", "print('why'); exit(7)"]))
    assert stages(tmp_path) == {"bad": ("failed", "exit code 7; why; see bad.log")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check itself runs here")
def test_without_a_gpu_it_fails_at_once_and_says_so(tmp_path: Path) -> None:
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    outcomes = stages(tmp_path)
    assert outcomes["machine"][0] == "failed"
    assert "sees no GPU" in outcomes["machine"][1]
    assert {outcome for name, (outcome, _) in outcomes.items() if name != "machine"} == {"skipped"}
    assert {"pytest -m cuda", "memcheck", "racecheck", "synccheck", "benchmark"} <= set(outcomes)


def test_places_of_cuda_tests() -> None:
    """Files and not folders: the neighbours of a marked test may need packages that are not there."""
    places = gpu_check.places_of_cuda_tests()
    assert "tests/gpu" in places
    assert all(place == "tests/gpu" or place.endswith(".py") for place in places)
    assert any(place.startswith("tests/optim/") for place in places)


def test_an_error_of_a_stage_itself_is_its_failure(tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() + 60)
    check.stage("absent", lambda: check.call("absent.log", ["/no/such/program"]))
    check.stage("bug", lambda: str({}["key"]))
    check.stage("exits", lambda: sys.exit("GRADFAST_CUDA=1, but CUDA can't be built"))
    check.stage("next", lambda: "ran")
    assert {name: outcome for name, (outcome, _) in stages(tmp_path).items()} == {
        "absent": "failed",
        "bug": "failed",
        "exits": "failed",
        "next": "passed",
    }
    assert stages(tmp_path)["exits"][1] == "SystemExit: GRADFAST_CUDA=1, but CUDA can't be built"


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    """A compiler that make left behind would take the time of the stages that follow."""
    check = Check(tmp_path, time.monotonic() + 60)
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True); sys.exit(3)"
    check.stage("leaves a child", lambda: check.call("child.log", [sys.executable, "-c", code]))
    child = int((tmp_path / "child.log").read_text())
    for _ in range(100):
        if not is_running(child):
            break
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- a whole run on a machine that pretends to have a GPU ----------------------------------------------------------

SETUP = """
import json, os, pathlib
assert os.environ["GRADFAST_CUDA"] == "1" and os.environ["TORCH_CUDA_ARCH_LIST"] == "native"
pathlib.Path("gradfast/_build.json").write_text(json.dumps({"summary": "built"}))
"""
MAKEFILE = """
gpu:
\t@mkdir -p ../../build/device-test-gpu
\t@printf '#!/bin/sh\\necho "$$@"; echo "7 passed, 0 failed"\\n' >../../build/device-test-gpu/device_test
\t@chmod +x ../../build/device-test-gpu/device_test
"""
BENCH = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
results = [
    {
        "workload": workload, "peer": peer, "optimizer": optimizer, "dtype": "fp32", "ratio": {"median": 0.5},
        "fraction_of_memory": 0.8, "gradfast": {"host_seconds": 1e-5, "launches": 1},
    }
    for workload in ("resnet50", "gpt2-124m") for peer in ("torch-fused", "torch-unclipped") for optimizer in ("SGD",)
]
(folder / "bench.json").write_text(json.dumps({"copy_bytes_per_second": 3e12, "results": results}))
(folder / "bench.md").write_text("| a table |")
"""
SANITIZER = """#!/bin/sh
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 8
shift 4; "$@" || exit 9
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Returns a function that writes a source tree of stubs, with other ones where it is told, and its root."""
    if shutil.which("make") is None:
        pytest.skip("no make")

    def write(**changes: str) -> Path:
        files = {
            "setup.py": SETUP,
            "tests/device/Makefile": MAKEFILE,
            "gradfast/__init__.py": "",
            "gradfast/__main__.py": BENCH,
            "tests/gpu/test_stub.py": "import pytest\n@pytest.mark.cuda\ndef test_stub(): pass\n",
            "bin/compute-sanitizer": SANITIZER,
            "bin/nvidia-smi": "#!/bin/sh\necho 580.1",
            **changes,
        }
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text:
                path.write_text(text)
            else:
                path.touch()
            path.chmod(0o755)
        return tmp_path / "root"

    properties = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "root")
    monkeypatch.setattr(gpu_check, "find_nvcc", lambda: tmp_path / "root" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'root' / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return write


def run(root: Path, *flags: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    code = gpu_check.main(["--output", str(root / "out"), *flags])
    return code, stages(root / "out"), (root / "out" / "report.md").read_text()


ALL = ("machine", "build", "pytest -m cuda", "build the kernels' test", "the kernels' test", "memcheck", "racecheck")
ALL = (*ALL, "synccheck", "benchmark")


def test_a_whole_run(machine: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = machine()
    code, outcomes, table = run(root)
    assert code == 0, outcomes
    assert {name: outcome for name, (outcome, _) in outcomes.items()} == dict.fromkeys(ALL, "passed")
    assert outcomes["build"][1] == "built"
    assert outcomes["pytest -m cuda"][1].startswith("1 passed")
    assert outcomes["the kernels' test"][1] == "7 passed, 0 failed"
    assert outcomes["memcheck"][1] == "ERROR SUMMARY: 0 errors"
    assert outcomes["benchmark"][1] == "copy bandwidth 3000 GB/s"
    report = json.loads((root / "out" / "report.json").read_text())
    assert report["machine"]["driver"] == "580.1"
    assert report["machine"]["copy_gb_per_second"] == 3000.0
    assert report["benchmark"]["results"]
    assert table.count("| passed |") == 9
    assert "| a table |" in table
    assert "| resnet50 SGD: device time over clip + fused | at most 0.55 | 0.50 | met |" in table
    assert "| gpt2-124m SGD: bytes' floor over time, of the copy bandwidth | at least 85% | 80% | missed |" in table
    assert "| resnet50 AdamW: device time over clip + fused | at most 0.55 |  | not measured |" in table
    assert "nothing failed; written to" in capsys.readouterr().out


def test_a_build_that_fails_leaves_what_needs_no_build(
    machine: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = machine(**{"setup.py": "print('error: kernel.cu(3): no'); raise SystemExit(1)"})
    code, outcomes, table = run(root)
    assert code == 1
    assert outcomes["build"] == ("failed", "exit code 1; error: kernel.cu(3): no; see build.log")
    skipped = [name for name, (outcome, _) in outcomes.items() if outcome == "skipped"]
    assert skipped == ["pytest -m cuda", "benchmark"]
    assert outcomes["synccheck"][0] == "passed"
    assert table.count("not measured") == len(targets.judge(None)) == 14
    assert "FAILED: build; written to" in capsys.readouterr().out


def test_failures_of_tests_sanitizer_and_benchmark_are_told_apart(machine: Callable[..., Path]) -> None:
    failing = "import pytest\n@pytest.mark.cuda\ndef test_stub(): assert False\n"
    refused = BENCH + "print('REFUSED, a wrong update'); sys.exit(1)\n"
    root = machine(
        **{
            "tests/gpu/test_stub.py": failing,
            "gradfast/__main__.py": refused,
            "bin/compute-sanitizer": "#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'; exit 9",
        }
    )
    code, outcomes, table = run(root)
    assert code == 1
    failed = {name for name, (outcome, _) in outcomes.items() if outcome == "failed"}
    assert failed == {"pytest -m cuda", "memcheck", "racecheck", "synccheck", "benchmark"}
    assert outcomes["memcheck"][1] == "exit code 9; ========= ERROR SUMMARY: 2 errors; see memcheck.log"
    assert "| a table |" in table  # what was measured before it failed


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"bin/compute-sanitizer": "#!/bin/sh\necho 'Error: Device not supported'; exit 1"}, "does not support this"),
        ({}, "no compute-sanitizer on PATH"),
    ],
)
def test_without_a_sanitizer_that_works_the_rest_runs(
    changes: dict[str, str], note: str, machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine(**changes)
    if not changes:
        monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    code, outcomes, _ = run(root)
    assert code == 0
    assert {outcomes[tool][0] for tool in gpu_check.SANITIZERS} == {"skipped"}
    assert note in outcomes["memcheck"][1]
    assert outcomes["benchmark"][0] == "passed"


def test_a_hanging_stage_leaves_the_benchmark_its_time(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "run_pytest", lambda check: check.call("hang.log", ["sleep", "300"]))
    start = time.monotonic()
    code, outcomes, _ = run(machine(), "--limit", "30")
    assert time.monotonic() - start < 30
    assert code == 1
    assert outcomes["pytest -m cuda"][0] == "failed"
    assert outcomes["pytest -m cuda"][1].startswith("stopped after ")
    assert {outcomes[name][0] for name in ALL if name != "pytest -m cuda"} == {"passed"}


def test_terminated_it_stops_what_runs_and_reports(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "run_device_test", lambda check: check.call("hang.log", ["sleep", "300"]))

    def terminate_when_it_hangs(log: Path) -> None:
        while not log.exists():
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    root = machine()
    thread = threading.Thread(target=terminate_when_it_hangs, args=(root / "out" / "hang.log",), daemon=True)
    thread.start()
    code, outcomes, _ = run(root)
    thread.join()
    assert code == 1
    assert outcomes["the kernels' test"] == ("failed", "interrupted")
    assert outcomes["memcheck"] == outcomes["benchmark"] == ("skipped", "interrupted before it")
    assert set(outcomes) == set(ALL)
