"""`gradfast predict`: what evaluation would have said, in lines that other programs read."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.trained_runs import train_variant

import gradfast.train
from gradfast.cli import main
from gradfast.train.trained.predict import Prediction, find_images
from gradfast.train.trained.predict_output import BoxLines, CocoResults, read_ids


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_variant("crop", photos, tmp_path_factory.mktemp("runs"))


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments)]) == 0
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))


def test_every_image_of_a_folder_in_order(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predicted(capsys, run, photos, "--batch-size", "5", "--top", "9")
    files = [str(path) for path in sorted(photos.rglob("*.png"))]
    assert [row["file"] for row in rows] == [file for file in files for _ in range(2)]
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "1", "2"]
    model, classes, transform = gradfast.train.load_model(run)
    with torch.inference_mode():
        probabilities = model(torch.stack([transform(file) for file in files])).softmax(dim=1)
    for row in rows:
        expected = float(probabilities[files.index(row["file"]), classes.index(row["class"])])
        assert float(row["probability"]) == pytest.approx(expected, abs=2e-6)  # six digits, and another batch's size
    assert all(float(first["probability"]) >= 0.5 for first in rows[::2])


def test_lines_of_json_in_a_file(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "p.jsonl"
    assert predicted(capsys, run, photos / "dots" / "000.png", photos / "stripes", "--output", output) == []
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(entries) == 17 and entries[0]["file"] == str(photos / "dots" / "000.png")
    assert [len(entry["predictions"]) for entry in entries] == [1] * 17
    assert entries[0]["predictions"][0].keys() == {"class", "probability"}


def test_bad_images_are_named_and_the_exit_code_tells(
    run: Path, own_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = own_photos / "dots" / "000.png"
    bad.write_bytes(bad.read_bytes()[:60])
    capsys.readouterr()
    assert main(["predict", str(run), str(own_photos), "none.png"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 9 and str(bad) not in out
    assert f"skipped {bad}: " in err and "skipped none.png: No such file or directory" in err
    assert "2 of 11 images could not be read" in err


def test_images_of_every_mode(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (40, 20)).save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
    assert len(predicted(capsys, run, tmp_path)) == 7


def test_a_reader_that_stops_early_ends_it_as_it_ends_other_commands(run: Path, photos: Path) -> None:
    command = f"{sys.executable} -m gradfast predict {run} {photos} {photos} --top 2 | head -n 2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 128 + signal.SIGPIPE and len(done.stdout.splitlines()) == 2, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--output", "p.json"], r"give a name that ends in \.csv or \.jsonl"),
        (["--pictures", "seen"], "--pictures draws boxes, and .* is a classifier"),
        (["--annotations", "a.json"], "--annotations gives the ids for"),
        (["--top", "0"], "--top: expected a whole number of at least 1"),
        (["--score", "1.5"], "--score: expected a number from 0 to 1"),
        (["--device", "abacus"], "--device abacus does not work here"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], pattern: str, run: Path, photos: Path, in_tmp: Path, refused: Callable[[list[str], str], str]
) -> None:
    refused(["predict", str(run), str(photos), *flags], pattern)
    assert list(in_tmp.iterdir()) == []


def test_a_folder_without_images(run: Path, tmp_path: Path, refused: Callable[[list[str], str], str]) -> None:
    refused(["predict", str(run), str(tmp_path)], "holds no image")


def test_files_are_taken_whatever_their_names(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((photos / "dots" / "000.png").read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "b.png").write_bytes(b"")
    assert find_images([str(tmp_path / "a"), str(tmp_path)]) == [tmp_path / "a", tmp_path / "b.png"]


BOXES = Prediction(
    Path("scenes/7.jpg"),
    3,
    torch.zeros(3, 8, 8, dtype=torch.uint8),
    boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 2.0, 2.5]]),
    labels=torch.tensor([2, 1]),
    scores=torch.tensor([0.75, 0.25]),
)


def test_boxes_as_csv_and_json_lines() -> None:
    lines = BoxLines(("cat", "dog"), 0.5, "csv")
    assert lines.begin() == "file,class,score,x,y,width,height\n"
    assert lines.one(BOXES) == "scenes/7.jpg,dog,0.7500,1.00,2.00,3.00,6.00\n"
    entry = json.loads(BoxLines(("cat", "dog"), 0.2, "jsonl").one(BOXES))
    assert entry["file"] == "scenes/7.jpg" and [box["class"] for box in entry["boxes"]] == ["dog", "cat"]
    assert entry["boxes"][1] == {"class": "cat", "bbox": [0.0, 0.0, 2.0, 2.5], "score": 0.25}


def test_cocos_results_with_the_ids_of_an_annotations_file(tmp_path: Path) -> None:
    plain = CocoResults(("cat", "dog"), 0.0)
    first, second = json.loads(plain.begin() + plain.one(BOXES) + plain.end())
    assert first == {"image_id": 3, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.75, "file_name": "7.jpg"}
    assert second["category_id"] == 1
    truth = {
        "images": [{"id": 42, "file_name": "images/7.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    mapped = CocoResults(("cat", "dog"), 0.5, *read_ids(tmp_path / "a.json", ("cat", "dog")))
    (only,) = json.loads(mapped.begin() + mapped.one(BOXES) + mapped.end())
    assert (only["image_id"], only["category_id"]) == (42, 18)
    empty = CocoResults(("cat", "dog"), 0.9)
    assert json.loads(empty.begin() + empty.one(BOXES) + empty.end()) == []
