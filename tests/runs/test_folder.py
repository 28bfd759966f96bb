"""A run folder in every state, whole and damaged."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

pytest.importorskip("yaml", exc_type=Exception)
pytest.importorskip("torchvision", exc_type=Exception)

from runs.cases import epoch_row, write_run

from gradfast.errors import UserError
from gradfast.runs.folder import find_runs, read_run_folder
from gradfast.train.results.claim import Claims, is_claimed
from gradfast.train.results.history import to_csv


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run_folder(write_run(tmp_path / "a", [0.5, 0.75, 0.625]))
    assert (run.state, run.problems, run.task, run.epochs, run.planned) == ("finished", [], "classify", 3, 3)
    assert run.best == (0.75, 2, "eval_balanced_acc")
    assert run.last("train_loss") == pytest.approx(1 / 3)
    assert run.largest("grad_norm_max") == 30 and run.mean("clip_fraction") == 0.5
    assert run.total("skipped_steps") == 3 and run.seconds == 120
    assert run.age(now=run.changed + 5) == pytest.approx(5)


def test_fewer_epochs_than_planned_is_stopped(tmp_path: Path) -> None:
    assert read_run_folder(write_run(tmp_path / "a", [0.5])).state == "stopped"
    assert read_run_folder(write_run(tmp_path / "b", [])).state == "stopped"


def test_a_locked_folder_is_running_and_free_afterwards(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.5])
    with Claims() as claims:
        claims.take(folder)
        assert is_claimed(folder) and read_run_folder(folder).state == "running"
    assert not is_claimed(folder) and read_run_folder(folder).state == "stopped"


def test_a_run_that_has_only_begun_is_running_and_not_broken(tmp_path: Path) -> None:
    with Claims() as claims:
        claims.take(tmp_path)
        run = read_run_folder(tmp_path)
    assert (run.state, run.problems) == ("running", [])


def _look_for_ever(folder: Path, started: multiprocessing.synchronize.Event) -> None:
    while True:
        is_claimed(folder)
        started.set()


def test_looking_at_a_folder_does_not_keep_a_run_out(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    looking = context.Process(target=_look_for_ever, args=(tmp_path, started), daemon=True)
    looking.start()
    try:
        assert started.wait(60)
        for _ in range(200):
            with Claims() as claims:
                claims.take(tmp_path)
    finally:
        looking.kill()
        looking.join()


def test_the_first_of_equal_epochs_is_the_best_and_nan_is_not(tmp_path: Path) -> None:
    nan = float("nan")
    assert read_run_folder(write_run(tmp_path / "a", [nan, 0.5, 0.5])).best == (0.5, 2, "eval_balanced_acc")
    assert read_run_folder(write_run(tmp_path / "b", [nan])).best is None


def test_the_best_epoch_of_a_detector_is_by_ap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.5], task="detect")
    rows = [epoch_row(number, 0.5) | {"eval_AP": score} for number, score in ((1, 0.25), (2, 0.125))]
    for row in rows:
        del row["eval_balanced_acc"]
    (folder / "summary.csv").write_text(to_csv(rows[0], rows))
    run = read_run_folder(folder)
    assert run.task == "detect" and run.best == (0.25, 1, "eval_AP")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.yaml", b"{", "config.yaml is not YAML"),
        ("config.yaml", b"\xff\xfe", "config.yaml is not YAML"),
        ("config.yaml", b"", "config.yaml holds no settings"),
        ("config.yaml", b"- 1\n", "config.yaml holds no settings"),
        ("config.yaml", None, "no config.yaml"),
        ("summary.csv", None, "no summary.csv"),
        ("summary.csv", b"epoch,seconds\n1,\x00\n", "summary.csv is damaged"),
        ("summary.csv", b"epoch,seconds\n1\n", "summary.csv is damaged"),
        ("summary.csv", b"epoch,seconds\n1,x\n", "summary.csv is damaged"),
        ("summary.csv", b"a,b\n1,2\n", "summary.csv is damaged"),
        ("summary.csv", b"\xff\xfe\x00", "summary.csv is damaged"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_is_read(
    name: str, content: bytes | None, problem: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "a", [0.5, 0.75, 0.625])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    run = read_run_folder(folder)
    assert run.state == "broken" and len(run.problems) == 1 and run.problems[0].startswith(problem)
    assert (run.epochs == 3) == (name == "config.yaml") and (run.planned == 3) == (name == "summary.csv")


def test_a_table_that_is_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [0.5])
    (folder / "summary.csv").unlink()
    (folder / "summary.csv").mkdir()
    assert read_run_folder(folder).problems == ["summary.csv: Is a directory"]


def test_runs_are_found_below_a_root(tmp_path: Path) -> None:
    for name in ("a", "sweep/b", "sweep/deeper/c", "too/deep/to/be/found"):
        write_run(tmp_path / name, [0.5])
    (tmp_path / "died-at-once").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "not-a-run" / "report.txt").write_text("x")
    names = [os.fspath(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert names == ["a", "died-at-once", "sweep/b", "sweep/deeper/c"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        find_runs(tmp_path / "none")
