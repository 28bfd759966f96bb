"""Worker processes end with the run, quietly, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.cases import arguments, read_rows

FAILING_STEP = """
import sys
from gradfast.cli import main
from gradfast.train.step import Learner

step, calls = Learner.step, []

def failing(self, batches):
    calls.append(None)
    if len(calls) == 3:
        raise ZeroDivisionError("in the third step")
    return step(self, batches)

Learner.step = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group(photos: Path, in_tmp: Path, number: signal.Signals) -> None:
    # what Ctrl-C in a terminal does, and what `timeout` and service managers do with SIGTERM
    flags = ("--epochs", 200, "--workers", 2, "--cache", "off", "--output", "run")
    command = [sys.executable, "-m", "gradfast", *arguments(photos, *flags)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch   1/200  loss"):
                os.killpg(process.pid, number)
                break
        output, error = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=60) == 128 + number
    assert f"stopped by {number.name}" in output
    assert error == ""
    assert 1 <= len(read_rows(Path("run/summary.csv"))) < 200


def test_an_error_within_an_epoch_does_not_wait_for_the_workers(photos: Path, in_tmp: Path) -> None:
    command = [sys.executable, "-c", FAILING_STEP, *arguments(photos, "--workers", 2, "--cache", "off")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: in the third step")
