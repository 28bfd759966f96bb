"""Pictures of predictions: what is drawn, where, and that it can be told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)
pytest.importorskip("matplotlib")

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from gradfast.train.coco.pictures import PREDICTION, TRUTH, draw_predictions, draw_scene

IMAGE = torch.full((3, 60, 80), 128, dtype=torch.uint8)
TARGET = {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "labels": torch.tensor([2])}
FOUND = {
    "boxes": torch.tensor([[12.0, 20, 30, 41], [1, 1, 5, 5], [float("nan"), 0, 1, 1]]),
    "labels": torch.tensor([1, 2, 1]),
    "scores": torch.tensor([0.75, 0.3, 0.9]),
}


def test_boxes_names_and_scores() -> None:
    axes = Figure().subplots()
    draw_scene(axes, IMAGE, TARGET, FOUND, ("crack", "cell"), threshold=0.5)
    assert [text.get_text() for text in axes.texts] == ["crack 0.75", "cell"]
    outlines = {patch.get_edgecolor(): patch for patch in axes.patches if isinstance(patch, Rectangle)}
    shapes = {(p.get_x(), p.get_y(), p.get_width(), p.get_height()): p.get_linestyle() for p in outlines.values()}
    assert shapes[9.5, 19.5, 20, 20] != "solid"  # the truth, dashed; edges lie between pixels
    assert shapes[11.5, 19.5, 18, 21] == "solid"
    assert TRUTH != PREDICTION


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (12, 3, 3)])
def test_one_grid_of_at_most_nine(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    path = tmp_path / "predictions.png"
    draw_predictions(path, [IMAGE] * count, [TARGET] * count, [FOUND] * count, ("crack", "cell"))
    with Image.open(path) as picture:
        assert picture.size == (columns * 400, rows * 400 + 60)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.png"]


def test_nothing_known_and_nothing_found(tmp_path: Path) -> None:
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0), "scores": torch.empty(0)}
    draw_predictions(tmp_path / "a.png", [IMAGE], [{}], [empty], ())
    draw_predictions(tmp_path / "b.png", [], [], [], ())
    assert (tmp_path / "a.png").stat().st_size > 0 and (tmp_path / "b.png").stat().st_size > 0
