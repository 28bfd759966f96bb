"""eval, predict, export and load_model of a detector."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)
pytest.importorskip("pycocotools")

import torch
from PIL import Image
from torch import Tensor
from train.cases import read_rows
from train.detection import detect_arguments, write_scenes

import gradfast.train
from gradfast.cli import main
from gradfast.train.coco.metrics import CocoEvaluation
from gradfast.train.coco.read import read_annotations
from gradfast.train.data.joined import join_scenes
from gradfast.train.tasks import find_task
from gradfast.train.trained.load import read_trained


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes to learn from and two held out, both parts numbered from 1."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder / "train", 3, seed=0, empty=0)
    write_scenes(folder / "val", 2, seed=1, empty=0)
    return folder


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single step: the boxes are poor, and there are some."""
    output = tmp_path_factory.mktemp("runs") / "detector"
    assert main(detect_arguments(scenes, "--epochs", 1, "--batch-size", 3, "--output", output)) == 0
    return output


def test_eval_gives_the_figures_of_the_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--device", "cpu", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = read_rows(run / "summary.csv")
    assert len(found["values"]) == 12
    for name, value in found["values"].items():
        assert value == float(row[name]) or (value is None and math.isnan(float(row[name])))
    known = [entry["AP"] for entry in found["per_class"].values() if entry["AP"] is not None]
    assert found["values"]["eval_AP"] == pytest.approx(sum(known) / len(known), abs=1e-12)
    assert found["images"] == 2 and found["same_data"] and found["confusion"] is None


def test_eval_of_all_scenes(run: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--device", "cpu", "--split", "all"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("5 training and held-out images of ")
    parts = [json.loads((scenes / part / "annotations.json").read_text())["annotations"] for part in ("train", "val")]
    boxes = [int(line.split()[1]) for line in out.splitlines() if line.startswith(("disc ", "square "))]
    assert sum(boxes) == sum(map(len, parts))


def test_joined_scenes_have_ids_of_their_own(run: Path) -> None:
    trained = read_trained(run / "best.pt")
    data = find_task("detect").build_data(trained.config, lambda text: None)
    joined = join_scenes(data.train, data.evaluation)
    assert [scene.image_id for scene in joined.listing.scenes] == [1, 2, 3, 4, 5]
    assert torch.equal(joined[0, 3][0], data.evaluation[0, 0][0])
    assert joined[0, 4][1]["image_id"] == 5 and torch.equal(joined[0, 4][1]["boxes"], data.evaluation[0, 1][1]["boxes"])


def test_no_confusion_of_a_detector(run: Path, refused: Callable[[list[str], str], str]) -> None:
    refused(["eval", str(run), "--confusion", "c.png"], "is a detector, and only a classifier confuses classes")


def by_hand(run: Path, images: list[Path]) -> list[dict[str, Tensor]]:
    model, classes, transform = gradfast.train.load_model(run)
    assert classes == ("disc", "square") and not model.training
    with torch.inference_mode():
        return model([transform(path) for path in images])


def test_predictions_are_those_of_the_model(run: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    images = [scenes / "val" / f"00{number}.png" for number in (1, 2)]
    assert main(["predict", str(run), *map(str, images), "--score", "0", "--device", "cpu"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    expected = by_hand(run, images)
    assert len(rows) == sum(len(found["boxes"]) for found in expected) > 10
    for image, found in zip(images, expected):
        own = [row for row in rows if row["file"] == str(image)]
        assert [row["class"] for row in own] == [("disc", "square")[label - 1] for label in found["labels"].tolist()]
        for row, (x1, y1, x2, y2), score in zip(own, found["boxes"].tolist(), found["scores"].tolist()):
            edges = [float(row[name]) for name in ("x", "y", "width", "height")]
            assert edges == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.006)  # two digits are written
            assert float(row["score"]) == pytest.approx(score, abs=6e-5)


def test_cocos_results_measure_as_the_run_did(run: Path, scenes: Path, tmp_path: Path) -> None:
    """Predictions written as COCO's results, with the ids of the annotations, and measured from that file."""
    output, annotations = tmp_path / "results.json", scenes / "val" / "annotations.json"
    command = ["predict", str(run), str(scenes / "val"), "--score", "0", "--device", "cpu"]
    assert main([*command, "--output", str(output), "--annotations", str(annotations)]) == 0
    listing, _ = read_annotations(annotations, [scenes / "val"])
    evaluation = CocoEvaluation(listing)
    results = json.loads(output.read_text())
    assert {entry["category_id"] for entry in results} <= {10, 20}
    for image_id in (1, 2):
        own = [entry for entry in results if entry["image_id"] == image_id]
        boxes = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([listing.categories.label(entry["category_id"]) for entry in own])
        scores = torch.tensor([entry["score"] for entry in own], dtype=torch.float64)
        evaluation.add([image_id], [{"boxes": boxes, "labels": labels, "scores": scores}])
    (row,) = read_rows(run / "summary.csv")
    assert evaluation.results().metrics["AP"] == pytest.approx(float(row["eval_AP"]), abs=1e-12)


def test_an_image_that_the_annotations_lack(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.png"
    other.write_bytes((scenes / "val" / "001.png").read_bytes())
    annotations = scenes / "val" / "annotations.json"
    command = ["predict", str(run), str(other), "--output", str(tmp_path / "r.json"), "--annotations", str(annotations)]
    assert main(command) == 2
    assert "other.png is not one of its images" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_pictures(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "seen"
    images = [str(scenes / part / "001.png") for part in ("train", "val")]
    assert main(["predict", str(run), *images, "--score", "0.1", "--pictures", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["001-2.png", "001.png"]
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) >= 300
    assert main(["predict", str(run), *images, "--pictures", images[0]]) == 2
    assert f"cannot write {images[0]}: File exists" in capsys.readouterr().err


def test_torchscript(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [scenes / "val" / f"00{number}.png" for number in (1, 2)]
    path, extra = tmp_path / "m.ts", {"gradfast.json": ""}
    command = ["export", str(run), "--format", "torchscript", "--output", str(path)]
    assert main([*command, "--images", *map(str, images)]) == 0
    assert " boxes it differs from the model by " in capsys.readouterr().out
    model = torch.jit.load(path, _extra_files=extra)
    transform = read_trained(run / "best.pt").transform
    with torch.inference_mode():
        found = model([transform.pixels(gradfast.train.data.preprocess.load_rgb(image)) for image in images])
    for one, other in zip(found, by_hand(run, images), strict=True):
        assert len(one["boxes"]) > 0 and torch.equal(one["labels"], other["labels"])
        assert torch.allclose(one["boxes"], other["boxes"], atol=1e-3) and torch.allclose(
            one["scores"], other["scores"]
        )
    metadata = json.loads(extra["gradfast.json"])
    assert metadata["classes"] == ["disc", "square"] and metadata["task"] == "detect"


@pytest.mark.slow
def test_onnx_of_an_image_of_another_shape(run: Path, scenes: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    path = tmp_path / "m.onnx"
    assert main(["export", str(run), "--format", "onnx", "--output", str(path)]) == 0
    image = Image.open(scenes / "val" / "001.png").crop((0, 0, 64, 48))
    image.save(tmp_path / "cut.png")
    pixels = read_trained(run / "best.pt").transform.pixels(image)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, labels, scores = session.run(["boxes", "labels", "scores"], {"image": pixels.numpy()})
    (expected,) = by_hand(run, [tmp_path / "cut.png"])
    assert labels.tolist() == expected["labels"].tolist() and len(labels) > 0
    assert torch.allclose(torch.from_numpy(boxes), expected["boxes"], atol=1e-3)
    assert torch.allclose(torch.from_numpy(scores), expected["scores"], atol=1e-5)


def test_torch_export_says_what_to_take_instead(run: Path, refused: Callable[[list[str], str], str]) -> None:
    refused(["export", str(run), "--format", "torch-export"], "take --format torchscript or onnx")
    refused(["export", str(run), "--format", "torchscript", "--img-size", "64"], "--img-size: a detector takes images")
