"""Files that are whole or not there, on disks that are full, slow to say so, or read only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import pytest

from gradfast.errors import UserError
from gradfast.files import append_whole, atomic_write
from gradfast.train.results.history import FIRST_COLUMNS, LAST_COLUMNS, History, read_csv, to_csv

COLUMNS = (*FIRST_COLUMNS, "eval_loss", *LAST_COLUMNS)


class FullDisk:
    """Stands in for a file of a disk that has room for so many bytes, and then none."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self.room:
            self.file.write(memoryview(data).cast("B")[: self.room])
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, room: int, only: str = "", modes: str = "wa") -> None:
    """From now on, files whose name contains `only` have room for so many bytes each, if opened in one of the modes."""
    real = Path.open

    def limited(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = real(path, mode, *more, **options)
        return FullDisk(file, room) if only in path.name and mode[0] in modes else file

    monkeypatch.setattr(Path, "open", limited)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    fill_disk(monkeypatch, room=2)
    with (
        pytest.raises(UserError, match=r"cannot write .*a: No space left on device; free some space"),
        atomic_write(path) as file,
    ):
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fails_only_when_told_to_keep_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="Input/output error"), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*none/a: No such file or directory"):
        append_whole(tmp_path / "none" / "a", "x")


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    append_whole(path, "one\n")
    append_whole(path, "two\n")
    fill_disk(monkeypatch, room=3)
    with pytest.raises(UserError, match="No space left on device"):
        append_whole(path, "three\n")
    assert path.read_text() == "one\ntwo\n"


def test_floats_read_back_to_the_bit(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300}]
    (tmp_path / "a.csv").write_text(to_csv(("epoch", "loss"), rows))
    assert read_csv(tmp_path / "a.csv") == rows


def test_a_line_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("epoch,loss\n1,0.5\n2,0.2")  # 0.25, say
    assert read_csv(tmp_path / "a.csv") == [{"epoch": 1, "loss": 0.5}]
    (tmp_path / "a.csv").write_text("")
    assert read_csv(tmp_path / "a.csv") == []


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("epoch,loss\n1,x\n")
    with pytest.raises(UserError, match=r"a\.csv is not a table of numbers"):
        read_csv(tmp_path / "a.csv")


def test_a_resumed_history_drops_what_will_be_done_again(tmp_path: Path) -> None:
    history = History(tmp_path, COLUMNS)
    history.start()
    step = dict.fromkeys(("loss", "grad_norm", "clip_coef", "lr", "seconds"), 0.5) | {"images": 4}
    for epoch in (1, 2, 3):
        history.add(
            dict.fromkeys(COLUMNS, 0.25) | {"epoch": epoch, "skipped_steps": 0},
            [{"epoch": epoch, "step": 2 * epoch - 1, **step}, {"epoch": epoch, "step": 2 * epoch, **step}],
        )
    resumed = History(tmp_path, COLUMNS)
    resumed.start(tmp_path, epochs=2)
    assert [row["epoch"] for row in resumed.summary] == [1, 2]
    assert [row["epoch"] for row in read_csv(tmp_path / "summary.csv")] == [1, 2]
    assert [row["step"] for row in read_csv(tmp_path / "steps.csv")] == [1, 2, 3, 4]
