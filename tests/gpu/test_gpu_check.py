"""`make gpu-check` where there is no GPU: its stages, what it keeps of them, and how it ends."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import gpu_check
from gpu.gpu_check import Check, Failure, Skip


def stages(folder: Path) -> dict[str, tuple[str, str]]:
    report = json.loads((folder / "report.json").read_text())
    assert set(report) == {"schema", "machine", "stages", "benchmark"}
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
    check.stage("slow", lambda: check.call("slow.log", [sys.executable, "-c", code], at_most=1.5))
    check.deadline = time.monotonic() + 1
    check.stage("late", lambda: pytest.fail("ran"))
    assert stages(tmp_path) == {
        "slow": ("failed", "stopped after 2 s; so far"),
        "late": ("skipped", "the time limit was reached"),
    }


def test_a_failing_command_tells_its_last_line_and_its_log(tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() + 60)
    check.stage("bad", lambda: check.call("bad.log", [sys.executable, "-c", "print('why'); exit(7)"], at_most=60))
    assert stages(tmp_path) == {"bad": ("failed", "exit code 7; why; see bad.log")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check itself runs here")
def test_without_a_gpu_it_fails_at_once_and_says_so(tmp_path: Path) -> None:
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    outcomes = stages(tmp_path)
    assert outcomes["machine"][0] == "failed"
    assert "sees no GPU" in outcomes["machine"][1]
    assert {outcome for name, (outcome, _) in outcomes.items() if name != "machine"} == {"skipped"}
    assert {"pytest -m cuda", "memcheck", "racecheck", "synccheck", "benchmark"} <= set(outcomes)


def test_folders_with_cuda_tests() -> None:
    assert "tests/gpu" in gpu_check.folders_with_cuda_tests()
