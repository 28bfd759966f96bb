"""examples/fsdp2.py as its own text says to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gradfast

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"


def torchrun(processes: int, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    package = str(Path(gradfast.__file__).parents[1])  # the one under test, wherever the example lies
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": package}
    done = subprocess.run(
        [*command, str(EXAMPLE), *map(str, arguments)], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_train_skip_a_bad_step_and_resume_on_fewer_processes(tmp_path: Path) -> None:
    first = torchrun(2, "--steps", "8", "--bad-step", "5", "--checkpoint", tmp_path / "run")
    assert "step    0" in first and "step    7" in first
    assert "skipped steps: 1" in first
    assert "first non-finite gradient in 'places'" in first
    again = torchrun(1, "--steps", "2", "--resume", "--checkpoint", tmp_path / "run")
    assert "step    9" in again and "step    7" not in again
    assert "skipped steps: 0" in again
