"""Composed scenes: boxes exact, no photograph on both sides, the same by seed, written whole or not at all."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import numpy
from PIL import Image

from gradfast.cli import main
from gradfast.data.compose import LARGEST_OVERLAP, Design, compose, overlap
from gradfast.data.scenes import make_scenes
from gradfast.data.texture import ground, random_phase
from gradfast.errors import UserError
from gradfast.files import temporary_name
from gradfast.train.coco.layout import list_coco
from gradfast.train.data.listing import Listing

DESIGN = Design(size=48, cells=(2, 4), scales=(0.2, 0.4))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """20 grey squares of noise, ten of each class, each of its own mean brightness."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = numpy.random.default_rng(0)
    paths = []
    for number in range(20):
        pixels = generator.normal(40 + 8 * number, 5, (30, 30)).clip(0, 255).astype(numpy.uint8)
        paths.append(folder / f"cell{number:02}.png")
        Image.fromarray(pixels).save(paths[-1])
    targets = tuple(number % 2 for number in range(20))
    strata = tuple((str(target),) for target in targets)
    return Listing(tuple(paths), targets, ("functional", "defective"), strata)


@pytest.fixture(scope="module")
def made(photographs: Listing, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "scenes"
    make_scenes(folder, photographs, (12, 6), DESIGN, seed=1)
    return folder


def read(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / part / "annotations.json").read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- the ground


def test_texture_has_the_mean_and_variance_of_the_photograph_and_none_of_its_shapes() -> None:
    generator = numpy.random.default_rng(0)
    photograph = generator.normal(120, 10, (64, 64))
    photograph[:, 30:33] = 20  # a busbar
    texture = random_phase(photograph, generator)
    assert texture.mean() == pytest.approx(photograph.mean(), rel=1e-12)
    assert texture.var() == pytest.approx(photograph.var(), rel=0.01)  # the highest frequencies' phases are not free
    amplitudes = [numpy.abs(numpy.fft.rfft2(image))[1:31, 1:31] for image in (photograph, texture)]
    assert numpy.allclose(*amplitudes, rtol=1e-9)
    assert abs(numpy.corrcoef(photograph.ravel(), texture.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("size", [20, 64, 150])
def test_ground_has_the_size_asked_for(size: int) -> None:
    assert ground(numpy.full((64, 64), 100.0), size, numpy.random.default_rng(0)).shape == (size, size)


# ---------------------------------------------------------------- one scene


def test_boxes_are_exact() -> None:
    """Photographs of one colour each: the pixels of that colour are those of the box, but for later cells on top."""
    colours = [0, 255]
    seen = 0
    for seed in range(10):
        pixels, placed = compose(
            Design(200, (2, 2), (0.2, 0.4)),
            [[0], [1]],
            lambda index: numpy.full((30, 30), colours[index], numpy.uint8),
            numpy.random.default_rng(seed),
        )
        mask = numpy.full(pixels.shape, -1)
        for cell in placed:
            mask[cell.top : cell.top + cell.side, cell.left : cell.left + cell.side] = cell.photograph
        for cell in placed:
            brightness = pixels[mask == cell.photograph].astype(float)
            # 0 and 255 times a light of at least 0.85, with noise of standard deviation 2 on it
            assert brightness.max() < 15 if cell.photograph == 0 else brightness.min() > 200
            seen += 1
    assert seen > 10


def test_cells_are_inside_nearly_apart_and_of_the_sizes_asked_for() -> None:
    turns, counts = set(), set()
    for seed in range(60):
        _, placed = compose(
            DESIGN,
            [[0, 1, 2, 3], [4, 5, 6, 7]],
            lambda _: numpy.zeros((9, 9), numpy.uint8),
            numpy.random.default_rng(seed),
        )
        assert len({cell.photograph for cell in placed}) == len(placed)
        for cell in placed:
            assert cell.left >= 0 and cell.top >= 0 and max(cell.left, cell.top) + cell.side <= DESIGN.size
            assert round(0.2 * 48) <= cell.side <= round(0.4 * 48)
            turns.add(cell.turns)
        squares = [(cell.left, cell.top, cell.side) for cell in placed]
        assert all(overlap(*pair) <= LARGEST_OVERLAP for pair in itertools.combinations(squares, 2))
        counts.add(len(placed))
    assert turns == {0, 1, 2, 3} and max(counts) == 4 and min(counts) >= 1


def test_overlap_is_of_the_smaller() -> None:
    assert overlap((0, 0, 10), (5, 5, 10)) == 0.25
    assert overlap((0, 0, 10), (2, 2, 4)) == 1.0
    assert overlap((0, 0, 10), (10, 0, 4)) == 0.0


# ---------------------------------------------------------------- the data set


def test_the_trainer_reads_it_without_a_complaint(made: Path) -> None:
    train, held_out, bad = list_coco(made)
    assert held_out is not None and (len(train), len(held_out)) == (12, 6) and bad == []
    assert train.classes == ("functional", "defective") and min(train.counts()) > 0
    assert all(Image.open(scene.path).size == (48, 48) for scene in train.scenes)


def test_classes_are_the_photographs(made: Path, photographs: Listing) -> None:
    target = dict(zip([path.name for path in photographs.paths], photographs.targets, strict=True))
    annotations = read(made, "train")["annotations"] + read(made, "val")["annotations"]
    assert all(one["category_id"] == target[one["photograph"]] + 1 for one in annotations)
    assert {one["rotation"] for one in annotations} <= {0, 90, 180, 270}


def test_no_photograph_is_on_both_sides(made: Path, photographs: Listing) -> None:
    used = [{one["photograph"] for one in read(made, part)["annotations"]} for part in ("train", "val")]
    assert used[0].isdisjoint(used[1])
    assert len(used[1]) <= 4  # a fifth of 20, as gradfast train holds out


def test_ground_and_clutter_come_from_the_same_side(
    photographs: Listing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gradfast.data import scenes

    opened: dict[str, set[str]] = {"train": set(), "val": set()}
    part = ""
    write_part = scenes.write_part

    def note(folder: Path, *rest: Any) -> Any:
        nonlocal part
        part = folder.name
        return write_part(folder, *rest)

    def spy(path: Path) -> numpy.ndarray:
        opened[part].add(path.name)
        return numpy.zeros((9, 9), numpy.uint8)

    monkeypatch.setattr(scenes, "write_part", note)
    monkeypatch.setattr(scenes, "load", spy)
    make_scenes(tmp_path / "scenes", photographs, (20, 20), DESIGN, seed=0)
    assert opened["train"] and opened["val"] and opened["train"].isdisjoint(opened["val"])


def test_the_seed_decides_every_byte(made: Path, photographs: Listing, tmp_path: Path) -> None:
    for seed in (1, 2):
        make_scenes(tmp_path / str(seed), photographs, (12, 6), DESIGN, seed)
    assert files_of(tmp_path / "1") == files_of(made) != files_of(tmp_path / "2")


def test_more_scenes_leave_the_first_as_they_were(made: Path, photographs: Listing, tmp_path: Path) -> None:
    make_scenes(tmp_path / "more", photographs, (14, 6), DESIGN, seed=1)
    first, more = files_of(made), files_of(tmp_path / "more")
    assert len(more) == len(first) + 2
    assert all(more[name] == content for name, content in first.items() if name != "train/annotations.json")


def test_licence_and_source_go_with_the_images(made: Path) -> None:
    content = read(made, "val")
    assert content["licenses"][0]["url"] == "https://creativecommons.org/licenses/by-nc-sa/4.0/"
    assert {image["license"] for image in content["images"]} == {content["licenses"][0]["id"]}
    licence = (made / "LICENSE.txt").read_text()
    assert "not for commercial use" in licence and "Deitsch" in licence and "Deitsch" in content["info"]["contributor"]


def test_an_existing_folder_is_refused(made: Path, photographs: Listing) -> None:
    before = files_of(made)
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        make_scenes(made, photographs, (1, 1), DESIGN, seed=0)
    assert files_of(made) == before


def test_a_failure_leaves_nothing(photographs: Listing, tmp_path: Path) -> None:
    gone = Listing(
        (Path("gone.png"), *photographs.paths[1:]), photographs.targets, photographs.classes, photographs.strata
    )
    with pytest.raises(UserError, match=r"cannot read the photograph gone\.png"):
        make_scenes(tmp_path / "sub" / "scenes", gone, (50, 50), DESIGN, seed=0)
    assert list((tmp_path / "sub").iterdir()) == []


# ---------------------------------------------------------------- the command


needs_photographs = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")


@needs_photographs
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scenes"
    command = [
        "data",
        "make-scenes",
        str(folder),
        "--images",
        "3",
        "--val-images",
        "2",
        "--size",
        "96",
        "--cells",
        "1",
        "3",
    ]
    assert main(command) == 0
    assert "3 training and 2 held-out scenes of 96 pixels" in capsys.readouterr().out
    assert main(["data", "check", str(folder)]) == 0
    assert "0 would be skipped" in capsys.readouterr().out
    assert main(command) == 2
    assert "exists, and nothing is overwritten" in capsys.readouterr().err


@needs_photographs
def test_killed_it_leaves_no_folder_and_the_next_run_tidies_up(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    command = [sys.executable, "-m", "gradfast", "data", "make-scenes", str(folder), "--size", "64", "--images"]
    process = subprocess.Popen([*command, "100000"])
    half_written = temporary_name(folder).with_name(f".scenes.{process.pid}.tmp")
    deadline = time.monotonic() + 120
    while not list(half_written.glob("train/images/*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert half_written.is_dir() and not folder.exists()
    subprocess.run([*command, "2", "--val-images", "1"], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert len(list_coco(folder)[0]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "8"], "--size 8: at least 32 pixels"),
        (["--cells", "3", "2"], "--cells 3 2: the fewest are more than the most"),
        (["--images", "0"], "argument --images: expected a whole number of at least 1, got '0'"),
        (["--image", "3"], "unrecognized arguments: --image 3; gradfast data --help"),
    ],
)
def test_mistakes_end_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "make-scenes", str(tmp_path / "scenes"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
