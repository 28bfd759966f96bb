"""`gradfast eval`: the figures of summary.csv again, and what they are made of."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import read_rows, write_images
from train.trained_runs import train_variant

from gradfast.cli import main
from gradfast.train.trained.class_scores import class_scores, confusion_csv, confusion_png
from gradfast.train.trained.evaluate_cli import class_table


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What ``gradfast eval ... --json -`` prints."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--device", "cpu", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.fixture(scope="module", params=["plain", "average", "crop", "bf16"])
def run(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_variant(request.param, photos, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_the_figures_are_those_of_the_summary_to_the_bit(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures(capsys, run / name)
    row = read_rows(run / "summary.csv")[found["epoch"] - 1]
    assert {column: float(row[column]) for column in found["values"]} == found["values"]
    assert set(found["values"]) == {"eval_loss", "eval_acc1", "eval_balanced_acc"}
    assert found["same_data"] and found["images"] == 7 and found["averaged"] == (run.name == "average")


def test_the_figures_fit_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, run)
    counts = torch.tensor(found["confusion"])
    assert counts.sum(dim=1).tolist() == [3, 4]
    assert found["values"]["eval_acc1"] == float(counts.diagonal().sum()) / 7
    recalls = [row["recall"] for row in found["per_class"].values()]
    assert found["values"]["eval_balanced_acc"] == pytest.approx(sum(recalls) / 2, abs=1e-15)


def test_another_batch_size_changes_rounding_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, single = (figures(capsys, run, "--batch-size", size) for size in (7, 1))
    assert whole["confusion"] == single["confusion"]
    tolerance = 1e-2 if run.name == "bf16" else 1e-5
    assert whole["values"]["eval_loss"] == pytest.approx(single["values"]["eval_loss"], rel=tolerance)


def test_all_images_are_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything, held_out = figures(capsys, run, "--split", "all"), figures(capsys, run)
    assert everything["images"] == 28 and [sum(row) for row in everything["confusion"]] == [12, 16]
    difference = torch.tensor(everything["confusion"]) - torch.tensor(held_out["confusion"])
    assert (difference >= 0).all() and everything["same_data"]


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_variant("plain", photos, tmp_path_factory.mktemp("runs"))


def test_other_data(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = write_images(tmp_path / "others", {"dots": 3, "stripes": 2}, seed=5)
    (others / "dots" / "broken.png").write_bytes(b"x")
    found = figures(capsys, plain, "--data", others)
    assert found["images"] == 5 and found["split"] == "all" and not found["same_data"]
    assert [sum(row) for row in found["confusion"]] == [3, 2]
    assert [Path(entry["file"]).name for entry in found["skipped"]] == ["broken.png"]


def test_other_classes_are_refused(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = write_images(tmp_path / "others", {"dots": 3, "rings": 2})
    assert main(["eval", str(plain), "--data", str(others)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "has the classes dots, rings, and" in last and "was trained on dots, stripes" in last
    assert main(["eval", str(plain), "--data", str(tmp_path / "none")]) == 2
    assert "none: there is no such folder" in capsys.readouterr().err.splitlines()[-1]


def test_changed_data_is_said(
    photos: Path, own_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_variant("plain", own_photos, tmp_path)
    (own_photos / "dots" / "000.png").unlink()
    assert main(["eval", str(run)]) == 0
    assert "warning: the images of " in capsys.readouterr().err
    assert not figures(capsys, run)["same_data"]


def test_the_text(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(plain)]) == 0
    out, err = capsys.readouterr()
    found = figures(capsys, plain)
    lines = out.splitlines()
    assert lines[0].startswith("7 held-out images of ")
    assert lines[2].split() == ["accuracy", f"{found['values']['eval_acc1']:.4f}"]
    assert lines[3].split() == ["balanced", "accuracy", f"{found['values']['eval_balanced_acc']:.4f}"]
    assert lines[5].split() == ["class", "images", "predicted", "precision", "recall", "f1"]
    assert [line.split()[:2] for line in lines[6:]] == [["dots", "3"], ["stripes", "4"]]
    assert "best.pt: resnet18 after" in err


def test_confusion_files(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "c.csv", tmp_path / "c.png"
    found = figures(capsys, plain, "--confusion", table, "--confusion", picture)
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["dots", "stripes"] and [row[0] for row in rows[1:]] == ["dots", "stripes"]
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == found["confusion"]
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) >= 300


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--split", "test"], "--split: expected one of val, all, got 'test'"),
        (["--confusion", "c.txt"], r"--confusion c\.txt: give a name that ends in"),
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1"),
        (["--amp", "fp8"], "--amp: expected one of"),
    ],
)
def test_flags_that_cannot_be(
    flags: list[str], pattern: str, plain: Path, refused: Callable[[list[str], str], str]
) -> None:
    refused(["eval", str(plain), *flags], pattern)


def test_scores_by_hand() -> None:
    """Three classes; the third is never there and never the answer."""
    scores = class_scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert scores["a"] == {"images": 4, "predicted": 5, "precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9}
    assert scores["b"] == {"images": 6, "predicted": 5, "precision": 4 / 5, "recall": 4 / 6, "f1": 8 / 11}
    assert all(math.isnan(scores["c"][name]) for name in ("precision", "recall", "f1"))


def test_names_with_commas_survive_the_table() -> None:
    rows = list(csv.reader(confusion_csv(torch.tensor([[1, 0], [2, 3]]), ["a, b", 'c"d']).splitlines()))
    assert rows == [["true \\ predicted", "a, b", 'c"d'], ["a, b", "1", "0"], ['c"d', "2", "3"]]


def test_many_classes() -> None:
    counts = torch.eye(70, dtype=torch.int64)
    counts[7, 7], counts[7, 8] = 0, 1
    names = [f"class-{number:02}" for number in range(70)]
    table = class_table(class_scores(counts, names))
    assert len(table) == 52 and table[1].startswith("class-07") and "50 of 70 classes with the lowest f1" in table[-1]
    assert confusion_png(counts, names, "many").startswith(b"\x89PNG")
