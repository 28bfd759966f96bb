"""``gradfast data check``: what would be skipped is what the trainer skips."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.cases import write_images
from train.coco.cases import box, content, write_coco

from gradfast.cli import main


def test_a_sound_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "photos", {"dots": 2, "stripes": 3})
    assert main(["data", "check", str(tmp_path / "photos")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "images in folders of classes",
        "  all: 5 images; 2 dots, 3 stripes",
        "0 would be skipped by gradfast train",
    ]


def test_damaged_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, {"dots": 2, "stripes": 3})
    (tmp_path / "val/dots/000.png").write_bytes(b"text")
    (tmp_path / "train/dots/notes.txt").touch()
    assert main(["data", "check", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "images in folders of classes",
        "  train: 5 images; 2 dots, 3 stripes",
        "  val: 4 images; 1 dots, 3 stripes",
        "2 would be skipped by gradfast train, and refused by --strict:",
        f"  {tmp_path}/train/dots/notes.txt: not an image file by its name",
        f"  {tmp_path}/val/dots/000.png: not an image",
    ]


def test_coco_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [
        box(1, 1, [1, 1, 5, 5]),
        box(2, 1, [2, 2, 0, 5]),
        box(3, 1, [1, 1, 9, 9], iscrowd=1),
        box(4, 3, [1, 1, 5, 5]),
    ]
    file = write_coco(tmp_path, content(3, boxes))
    (tmp_path / "3.png").write_bytes(b"text")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "COCO annotations",
        "  all: 2 images; 1 crack, 0 cell, 1 crowds, 1 images without a box",
        "2 would be skipped by gradfast train, and refused by --strict:",
        f"  {file}, annotation 2 of 1.png: its bbox [2, 2, 0, 5] has no width",
        f"  {tmp_path}/3.png: not an image",
    ]


def test_a_long_list_is_cut_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path, content(1, [box(number, 1, [1, 1, 0, 0]) for number in range(30)]))
    assert main(["data", "check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 20 + 1 and lines[-1] == "  and 10 more; --all lists them"
    assert main(["data", "check", str(tmp_path), "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3 + 30


def test_a_folder_that_holds_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
