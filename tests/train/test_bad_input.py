"""Bad input: one line that says what is wrong and what to do, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.cases import arguments, read_rows, write_images
from train.test_files import fill_disk

from gradfast.cli import main
from gradfast.train.data import build as data_module
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.trainer import Trainer

Refused = Callable[[list[str], str], str]


@pytest.fixture(autouse=True)
def _nothing_left_behind(in_tmp: Path, request: pytest.FixtureRequest) -> object:
    """Every test runs in an empty folder, which must be empty after it unless the test is marked as writing."""
    yield
    if "writes" not in request.fixturenames:
        assert list(in_tmp.iterdir()) == []


@pytest.fixture
def writes() -> None:
    """For tests whose command gets as far as writing."""


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opt", "lamb"], r"--opt: expected one of sgd, adam, adamw, lion, got 'lamb'"),
        (["--sched", "cosin"], r"--sched: expected one of one-cycle, cosine"),
        (["--epochs", "0"], r"--epochs: expected a whole number of at least 1, got '0'"),
        (["--lr", "fast"], r"--lr: expected a number of at least 0, got 'fast'"),
        (["--amp", "int8"], r"--amp: expected one of off, bf16, fp16"),
        (["--epoch", "3"], r"unknown argument '--epoch'; did you mean --epochs\?"),
        (["--batchsize=3"], r"unknown argument '--batchsize=3'; did you mean --batch-size\?"),
        (["--lr"], r"--lr: expected one argument; gradfast train --help"),
        (["photos"], r"unknown argument 'photos'"),
        (["--model", "resnet5"], r"no classification model 'resnet5'; did you mean .*resnet50"),
        (["--model", "fasterrcnn_resnet50_fpn"], r"no classification model"),
        (["--device", "gpu"], r"--device gpu does not work here"),
        (["--img-size", "8", "--model", "alexnet"], r"alexnet does not take images of 8 x 8 pixels"),
        (["--model", "alexnet", "--zero-init-residual"], r"--zero-init-residual: alexnet has no residual blocks"),
        (["--amp", "fp16", "--nonfinite", "raise"], r"--amp fp16 needs --nonfinite skip"),
        (["-c", "none.yaml"], r"cannot read the configuration none.yaml"),
        (["--resume", "none"], r"there is no checkpoint none"),
        (["--batch-size", "1"], r"--batch-size 1: batch norms need 2 images; give 2 or more, or take --norm group"),
    ],
)
def test_flags(photos: Path, refused: Refused, flags: list[str], message: str) -> None:
    refused(arguments(photos, *flags), message)


def test_commands(refused: Refused) -> None:
    refused(["trian"], r"there is no command 'trian'; did you mean train\?")
    refused(["fly"], r"there is no command 'fly'; the commands are train, ")


# ---------------------------------------------------------------- data


def test_missing_folder(tmp_path: Path, refused: Refused) -> None:
    refused(arguments(tmp_path / "none"), r"--data .*none: there is no such folder")


def test_file_instead_of_folder(own_photos: Path, refused: Refused) -> None:
    refused(arguments(own_photos / "dots" / "000.png"), r"000\.png: this is a file; give the folder")


def test_empty_folder(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused(arguments(tmp_path / "empty"), r"empty is empty; expected one folder of images per class")


def test_folder_that_may_not_be_read(own_photos: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    deep = own_photos / "dots" / "more"
    deep.mkdir()
    (own_photos / "dots" / "000.png").rename(deep / "000.png")
    look = os.scandir

    def locked(path: Any) -> Any:
        if os.fspath(path) == os.fspath(deep):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return look(path)

    monkeypatch.setattr(os, "scandir", locked)
    refused(arguments(own_photos), r"cannot read the folder .*dots/more: Permission denied")
    refused(["data", "check", str(own_photos)], r"cannot read the folder .*dots/more: Permission denied")


def test_whatever_may_not_be_read(own_photos: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def locked(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    with monkeypatch.context() as locking:
        locking.setattr(Path, "iterdir", locked)
        refused(arguments(own_photos, "--output", own_photos), r"cannot use .*photos: Permission denied")


def test_class_without_an_image(own_photos: Path, refused: Refused) -> None:
    (own_photos / "circles").mkdir()
    refused(arguments(own_photos), r"class 'circles' has no image in .*photos; add images or remove the class")


def test_class_without_a_sound_image(own_photos: Path, refused: Refused) -> None:
    for path in (own_photos / "dots").iterdir():
        path.write_bytes(b"spoiled")
    refused(arguments(own_photos), r"class 'dots' has no image in .*photos, bad images left out")


def test_class_of_one_image(own_photos: Path, refused: Refused) -> None:
    write_images(own_photos, {"circles": 1})
    refused(arguments(own_photos), r"class 'circles' has one image, and a split")


def test_class_without_held_out_image(own_photos: Path, tmp_path: Path, refused: Refused) -> None:
    write_images(tmp_path / "both" / "val", {"dots": 1, "stripes": 1})
    (tmp_path / "both" / "val" / "dots" / "000.png").unlink()
    own_photos.rename(tmp_path / "both" / "train")
    refused(arguments(tmp_path / "both"), r"class 'dots' has no image in .*val")


def spoil(folder: Path) -> None:
    """Three files that cannot be used, in one class."""
    whole = (folder / "dots" / "000.png").read_bytes()
    (folder / "dots" / "000.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dots" / "text.jpg").write_text("no image")
    (folder / "dots" / "notes.txt").write_text("no image either")


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_bad_images_are_named_skipped_and_counted(
    own_photos: Path, writes: None, capsys: pytest.CaptureFixture[str], augment: str
) -> None:
    spoil(own_photos)
    assert main(arguments(own_photos, "--augment", augment, "--epochs", 1, "--output", "run")) == 0
    out = capsys.readouterr().out
    assert f"skipped {own_photos / 'dots' / '000.png'}: " in out and "truncated" in out.lower()
    assert f"skipped {own_photos / 'dots' / 'text.jpg'}: not an image" in out
    assert f"skipped {own_photos / 'dots' / 'notes.txt'}: not an image file by its name" in out
    assert "; 3 files skipped" in out
    assert Path("run/skipped_images.txt").read_text().count("\n") == 3
    assert "7 training + 2 held-out" in out


def test_bad_images_are_refused_when_strict(own_photos: Path, refused: Refused) -> None:
    spoil(own_photos)
    refused(arguments(own_photos, "--strict"), r"--strict: .*notes\.txt cannot be used \(not an image file by its")
    (own_photos / "dots" / "notes.txt").unlink()
    refused(arguments(own_photos, "--strict"), r"--strict: .*dots/000\.png cannot be used \(.*\), and 1 more; mend")


def test_image_that_goes_bad_while_training(
    own_photos: Path, writes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_module, "CHECK_LIMIT", 0)
    (own_photos / "dots" / "000.png").write_bytes(b"spoiled")
    command = arguments(own_photos, "--cache", "off", "--workers", 1)
    assert main([*command, "--output", "run"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"skipped {own_photos / 'dots' / '000.png'}: not an image") == 1
    assert "unreadable files 1" in out
    assert main([*command, "--strict", "--output", "strict"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradfast: error: --strict: ") and error.count("\n") == 1
    assert load_checkpoint(Path("strict"))["position"]["epoch"] in (0, 1)


def test_images_that_vanish_while_training_end_the_run_and_it_goes_on_when_they_are_back(
    own_photos: Path, writes: None, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    away = own_photos.with_name("unmounted")
    real = Trainer.end_epoch

    def end_epoch(self: Trainer, *arguments: Any) -> None:
        real(self, *arguments)
        own_photos.rename(away)

    command = arguments(own_photos, "--cache", "off", "--workers", 0, "--epochs", 3, "--output", "run")
    with monkeypatch.context() as vanishing:
        vanishing.setattr(Trainer, "end_epoch", end_epoch)
        refused(
            command,
            r"epoch 2 had no step, for want of images that can be read: is .*photos still there\? the last checkpoint "
            r"is run/last\.pt, after 1 epochs, and gradfast train --resume run goes on from there",
        )
    away.rename(own_photos)
    assert main(["train", "--resume", "run"]) == 0
    assert [row["epoch"] for row in read_rows(Path("run/summary.csv"))] == ["1", "2", "3"]


def test_solar_cells_without_their_package(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if "elpv" in name else real(name, *more))
    refused(["train"], r"needs the package elpv-dataset, which is not installed: pip install 'gradfast\[demo\]'")


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch, photos: Path, refused: Refused) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused(arguments(photos), r"gradfast train needs the package 'torchvision'.*pip install 'gradfast\[train\]'")


# ---------------------------------------------------------------- results


def test_output_that_exists(photos: Path, writes: None, refused: Refused) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    refused(
        arguments(photos, "--output", "run"), r"--output run is not empty, and nothing is overwritten; .*--resume run"
    )
    assert [path.name for path in Path("run").iterdir()] == ["thesis.txt"]
    refused(arguments(photos, "--output", "run/thesis.txt"), r"--output run/thesis\.txt is a file")
    assert Path("run/thesis.txt").read_text() == "years of work"


def test_output_that_exists_is_not_resumed_into(photos: Path, writes: None, refused: Refused) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    refused(arguments(photos, "--resume", "auto", "--output", "run"), r"--output run is not empty")


def test_empty_output_is_used(photos: Path, writes: None) -> None:
    Path("run").mkdir()
    assert main(arguments(photos, "--epochs", 1, "--output", "run")) == 0


def test_output_that_cannot_be_made(photos: Path, writes: None, refused: Refused) -> None:
    Path("file").write_text("")
    refused(arguments(photos, "--output", "file/run"), r"cannot write file/run: Not a directory")


def test_damaged_checkpoint(photos: Path, writes: None, refused: Refused) -> None:
    assert main(arguments(photos, "--epochs", 1, "--output", "run")) == 0
    whole = Path("run/last.pt").read_bytes()
    for damaged in (whole[:-1000], whole[:100], b"", b"no checkpoint at all"):
        Path("run/last.pt").write_bytes(damaged)
        refused(["train", "--resume", "run"], r"run/last\.pt is damaged, cut short or not a checkpoint")
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2] ^= 1
    Path("run/last.pt").write_bytes(spoiled)
    refused(["train", "--resume", "run"], r"the checkpoint run/last\.pt is damaged \(checksum of")


def test_no_space_from_the_start(photos: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    fill_disk(monkeypatch, room=100_000, only="last.pt")
    refused(
        arguments(photos, "--output", "run"), r"cannot write run/last\.pt: No space left on device; free some space"
    )


def test_no_space_later_on(photos: Path, writes: None, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    assert main(arguments(photos, "--epochs", 1, "--output", "run")) == 0
    names = {path.name for path in Path("run").iterdir()}
    # room for what is written when the run starts, not for what the second epoch adds
    table = Path("run/summary.csv").stat().st_size + 20
    for full, mode, room in (("last.pt", "w", 900), ("steps.csv", "a", 100), ("summary.csv", "w", table)):
        with monkeypatch.context() as disk:
            fill_disk(disk, room, only=full, modes=mode)
            refused(["train", "--resume", "run", "--epochs", "2"], rf"cannot write run/{full}: No space left on device")
        assert load_checkpoint(Path("run"))["position"]["epoch"] == 1
        assert {path.name for path in Path("run").iterdir()} == names
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert [row["epoch"] for row in read_rows(Path("run/summary.csv"))] == ["1", "2"]
    assert len(read_rows(Path("run/steps.csv"))) == 10


def test_a_real_limit_on_file_size(photos: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    command = [sys.executable, "-m", "gradfast", *arguments(photos, "--output", "run")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == "gradfast: error: cannot write run/last.pt: File too large\n"


# ---------------------------------------------------------------- divergence


def test_divergence_ends_with_a_sentence(photos: Path, writes: None, refused: Refused) -> None:
    flags = ["--lr", 1e30, "--clip-grad", "off", "--sched", "constant", "--epochs", 3, "--output", "run"]
    refused(arguments(photos, *flags), r"every step of epoch \d was skipped .*training has diverged; .*lower --lr")
    assert load_checkpoint(Path("run"))["position"]["epoch"] >= 0


def test_raising_names_the_layer(photos: Path, writes: None, refused: Refused) -> None:
    flags = ["--lr", 1e30, "--clip-grad", "off", "--sched", "constant", "--nonfinite", "raise", "--output", "run"]
    refused(
        arguments(photos, *flags), r"epoch \d, batch \d: the gradient norm is (nan|inf).*in '(features|classifier)\."
    )
