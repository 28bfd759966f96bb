"""Snapshots on disk: whole or not there, and taken up again by a run that is resumed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard import killed_run
from guard.killed_run import CHECKPOINT_EVERY, Resumable
from guard.runs import Run

from gradfast.guard import Guard, SnapshotRing, TrainingStopped


def killed(folder: Path, step: str) -> None:
    """Let a run in a process of its own be killed at a step."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, killed_run.__file__, str(folder), step]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("snapshot-*.pt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Resumable:
    run = Resumable(tmp_path_factory.mktemp("uninterrupted"))
    run.train()
    assert run.guard.rollbacks >= 1
    return run


@pytest.mark.parametrize("step", ["133", "writing120", "139"])
def test_a_killed_run_rolls_back_to_what_its_first_process_left(
    step: str, uninterrupted: Resumable, tmp_path: Path
) -> None:
    """Killed in the poisoned stretch, within a snapshot's file, or after the roll-back. The first two end as if not.

    By then a snapshot was used up, and the resumed run goes back to the one before it.
    """
    killed(tmp_path, step)
    left = steps_in(tmp_path / "ring")
    assert left
    run = Resumable(tmp_path)
    run.resume()
    assert run.done % CHECKPOINT_EVERY == 0 and run.done <= 139
    adopted = [snapshot.step for snapshot in run.ring.ring]
    assert adopted == [each for each in left if each <= run.guard.steps] == steps_in(tmp_path / "ring")
    assert not list((tmp_path / "ring").glob(".*")), "half-written files are gone"
    weights = run.train()
    assert run.guard.rollbacks == uninterrupted.guard.rollbacks
    went_back = [event.message for event in run.guard.events if event.action == "rolled back"]
    assert f"to step {100 if step == '139' else 120} " in went_back[0]
    if step == "139":
        return
    for mine, other in zip(weights, uninterrupted.run.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def trained(ring: SnapshotRing, steps: int, state: dict | None = None, **options) -> tuple[Run, Guard]:
    run = Run(batches=steps, **options)
    guard = Guard(run.optimizer, model=run.model, snapshots=ring, max_consecutive_skips=3)
    if state is not None:
        guard.load_state_dict(state)
    for batch in run.batches():
        run.backward(batch)
        guard.step()
    return run, guard


def test_snapshots_from_after_the_resume_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, guard = trained(SnapshotRing(10, 5, tmp_path), 12)
    early = guard.state_dict()
    _, guard = trained(SnapshotRing(10, 5, tmp_path), 30, early)
    assert guard.steps == 42 and steps_in(tmp_path) == [0, 10, 20, 30, 40]
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        ring = SnapshotRing(10, 5, tmp_path)
        Guard(Run().optimizer, model=Run().model, snapshots=ring).load_state_dict(early)
    assert [snapshot.step for snapshot in ring.ring] == steps_in(tmp_path) == [0, 10]
    assert caplog.text.count("from after step 12, where the run is resumed") == 3


def test_unsound_ones_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, guard = trained(SnapshotRing(10, 5, tmp_path), 35)
    state = guard.state_dict()
    zero, ten, twenty, thirty = sorted(tmp_path.iterdir())
    ten.write_bytes(ten.read_bytes()[:500])
    torch.save({"optimizer": {}}, thirty)
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        ring = SnapshotRing(10, 5, tmp_path)
        Guard(Run().optimizer, model=Run().model, snapshots=ring).load_state_dict(state)
    assert sorted(tmp_path.iterdir()) == [zero, twenty]
    assert f"removed {ten}: it cannot be read" in caplog.text
    assert f"removed {thirty}: it does not hold model" in caplog.text


def test_what_another_run_left_is_never_rolled_back_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(SnapshotRing(10, 5, tmp_path), 25)
    others = set(tmp_path.iterdir())
    _, guard = trained(SnapshotRing(10, 5, tmp_path), 15)
    with caplog.at_level(logging.WARNING, logger="gradfast"):
        ring = SnapshotRing(10, 5, tmp_path)
        Guard(Run().optimizer, model=Run().model, snapshots=ring).load_state_dict(guard.state_dict())
    assert {snapshot.path for snapshot in ring.ring} == set(tmp_path.iterdir()) - others
    assert f"{tmp_path} holds 3 snapshots of other runs, which are left alone" in caplog.text


def test_a_file_that_broke_since_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = SnapshotRing(10, 5, tmp_path)
    _, guard = trained(ring, 15)
    sorted(tmp_path.iterdir())[-1].write_bytes(b"nothing")
    assert ring.restore(guard.parts) == 0
    assert "the snapshot of step 10 cannot be read" in caplog.text
    run = Run(dict.fromkeys(range(30), "nan"))
    last = Guard(run.optimizer, model=run.model, snapshots=ring, max_consecutive_skips=3)
    with pytest.raises(TrainingStopped, match="there is no snapshot that can be read"):
        for batch in run.batches():
            run.backward(batch)
            last.step()
            ring.ring[0].path.unlink(missing_ok=True)


def test_resumed_at_a_snapshot_the_ring_holds_it_once(tmp_path: Path) -> None:
    _, guard = trained(SnapshotRing(10, 2, tmp_path), 20)
    ring = SnapshotRing(10, 2, tmp_path)
    state = guard.state_dict()
    ring.adopt(state["run"], 20, guard.parts)
    ring.take(20, guard.parts)
    ring.take(20, guard.parts)
    assert [snapshot.step for snapshot in ring.ring] == [10, 20] == steps_in(tmp_path)
