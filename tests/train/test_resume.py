"""A run that was stopped and resumed is, to the bit, the run that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from train.cases import MODEL, arguments, untimed

from gradfast.cli import main
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.results.progress import Progress

EPOCHS = 4
Refused = Callable[[list[str], str], str]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four epochs of five steps, with dropout, momentum and a scheduled rate."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(photos, "--epochs", EPOCHS, "--output", output)) == 0
    return output


def assert_same_run(one: Path, other: Path) -> None:
    assert untimed(one / "summary.csv") == untimed(other / "summary.csv")
    assert untimed(one / "steps.csv") == untimed(other / "steps.csv")
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(one / name), load_checkpoint(other / name)
        for key, value in a["model"].items():
            assert torch.equal(value, b["model"][key]), (name, key)
        assert a["best"] == b["best"] and a["position"]["epoch"] == b["position"]["epoch"]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals) -> None:
    """Send this process a signal after so many optimiser steps."""
    count = 0
    real = Progress.due

    def due(self: Progress) -> bool:
        nonlocal count
        count += 1
        if count == steps:
            signal.raise_signal(number)
        return real(self)

    monkeypatch.setattr(Progress, "due", due)


@pytest.mark.parametrize(
    ("steps", "number", "code"),
    [(1, signal.SIGINT, 130), (7, signal.SIGTERM, 143), (15, signal.SIGINT, 130)],
    ids=["first step", "middle of an epoch", "end of an epoch"],
)
def test_stopped_by_a_signal(
    whole: Path,
    photos: Path,
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    number: signal.Signals,
    code: int,
) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background
    with monkeypatch.context() as stopped:
        stop_after(stopped, steps, number)
        assert main(arguments(photos, "--epochs", EPOCHS, "--output", "run")) == code
    assert f"stopped by {number.name} in epoch {(steps - 1) // 5 + 1}" in capsys.readouterr().out
    state = load_checkpoint(Path("run"))
    assert 5 * state["position"]["epoch"] + state["position"]["batch"] == steps
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(Path("run"), whole)
    assert signal.getsignal(signal.SIGINT) is before


def test_stopped_twice_and_resumed_with_other_workers(
    whole: Path, photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stop_after(stopped, 3, signal.SIGINT)
        assert main(arguments(photos, "--epochs", EPOCHS, "--output", "run")) == 130
    with monkeypatch.context() as stopped:
        stop_after(stopped, 8, signal.SIGINT)
        assert main(["train", "--resume", "run", "--workers", "1", "--cache", "off"]) == 130
    assert main(["train", "--resume", "auto", "--output", "run"]) == 0
    assert_same_run(Path("run"), whole)


def test_a_run_by_its_name_is_the_one_in_runs(photos: Path, in_tmp: Path) -> None:
    assert main(arguments(photos, "--epochs", 1)) == 0
    assert main(["train", "--resume", f"{MODEL}-photos-1", "--epochs", "2"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == [f"{MODEL}-photos-1"]
    assert load_checkpoint(Path(f"runs/{MODEL}-photos-1"))["position"]["epoch"] == 2


def test_stopped_within_accumulated_steps(photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = arguments(photos, "--grad-accum", 2)
    assert main([*command, "--output", "undisturbed"]) == 0
    with monkeypatch.context() as stopped:
        stop_after(stopped, 2, signal.SIGINT)
        assert main([*command, "--output", "run"]) == 130
    assert load_checkpoint(Path("run"))["position"]["batch"] == 4
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(Path("run"), Path("undisturbed"))


def test_averages_mixtures_and_plateaus_go_on_as_well(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--clip-policy",
        "autoclip",
        "--model-ema",
        "--mixup",
        0.4,
        "--cutmix",
        1,
        "--random-erase",
        0.3,
        "--auto-augment",
        "rand",
    ]
    flags += ["--sampler", "balanced", "--sched", "plateau", "--patience", 0, "--decay-rate", 0.5, "--epochs", 3]
    command = arguments(photos, *flags)
    assert main([*command, "--output", "undisturbed"]) == 0
    with monkeypatch.context() as stopped:
        stop_after(stopped, 8, signal.SIGINT)
        assert main([*command, "--output", "run"]) == 130
    assert main(["train", "--resume", "run", "--workers", "1", "--cache", "off"]) == 0
    assert_same_run(Path("run"), Path("undisturbed"))
    a, b = (load_checkpoint(Path(name))["average"] for name in ("run", "undisturbed"))
    assert a["updates"] == b["updates"] == 15
    assert all(torch.equal(a["module"][key], b["module"][key]) for key in a["module"])


def test_killed_at_once(whole: Path, photos: Path, in_tmp: Path) -> None:
    command = [sys.executable, "-m", "gradfast", *arguments(photos, "--epochs", EPOCHS, "--output", "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/4  loss"):
                process.kill()
        assert process.wait() == -signal.SIGKILL
    assert load_checkpoint(Path("run"))["position"]["epoch"] >= 2
    assert main(["train", "--resume", "runs-that-is-not"]) == 2
    assert main(["train", "--resume", "run/last.pt"]) == 0
    assert_same_run(Path("run"), whole)


def test_a_killed_runs_tables_may_be_ahead_of_its_checkpoint(whole: Path, in_tmp: Path) -> None:
    # killed after the tables were written and before the checkpoint was: the epoch's rows come once all the same
    shutil.copytree(whole, "run")
    shutil.copy(whole / "best.pt", "older.pt")
    done = load_checkpoint(Path("older.pt"))["position"]["epoch"]
    if done == EPOCHS:
        pytest.skip("the best epoch is the last one: there is no older checkpoint")
    shutil.copy("older.pt", "run/last.pt")
    assert main(["train", "--resume", "run"]) == 0
    assert_same_run(Path("run"), whole)


def test_more_epochs_for_a_finished_run(photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(photos, "--epochs", 1, "--sched", "constant", "--output", "run")) == 0
    assert main(["train", "--resume", "run"]) == 0
    assert "has all of its 1 epochs" in capsys.readouterr().out
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert "--epochs 1 -> 2" in capsys.readouterr().out
    assert main(arguments(photos, "--epochs", 2, "--sched", "constant", "--output", "straight")) == 0
    assert_same_run(Path("run"), Path("straight"))


def test_a_run_without_clipping_goes_on(photos: Path, in_tmp: Path) -> None:
    flags = ("--clip-grad", "off", "--sched", "constant")
    assert main(arguments(photos, "--epochs", 1, *flags, "--output", "run")) == 0
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert main(arguments(photos, "--epochs", 2, *flags, "--output", "straight")) == 0
    assert_same_run(Path("run"), Path("straight"))


def test_first_weights_are_not_needed_again(whole: Path, photos: Path, in_tmp: Path) -> None:
    shutil.copy(whole / "best.pt", "first.pt")
    flags = ("--weights", "first.pt", "--sched", "constant")
    assert main(arguments(photos, "--epochs", 1, *flags, "--output", "run")) == 0
    assert main(arguments(photos, "--epochs", 2, *flags, "--output", "straight")) == 0
    Path("first.pt").unlink()
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert_same_run(Path("run"), Path("straight"))


def test_resumed_into_another_folder(whole: Path, in_tmp: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert main(["train", "--resume", str(whole), "--epochs", "5", "--output", "longer"]) == 0
    assert untimed(Path("longer/steps.csv"))[: 5 * EPOCHS] == untimed(whole / "steps.csv")
    assert len(untimed(Path("longer/summary.csv"))) == 5 and Path("longer/best.pt").is_file()
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_resumed_from_the_best_leaves_its_folder_alone(whole: Path, in_tmp: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert main(["train", "--resume", str(whole / "best.pt"), "--epochs", "5"]) == 0
    (output,) = Path("runs").iterdir()
    assert len(untimed(output / "summary.csv")) == 5
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_auto_begins_where_there_is_nothing(photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(photos, "--epochs", 1, "--resume", "auto", "--output", "run")) == 0
    assert "no checkpoint in run; starting a new run" in capsys.readouterr().out


def test_auto_takes_the_newest(photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert main(arguments(photos, "--epochs", 1, "--output", f"runs/{name}")) == 0
    os.utime("runs/a/last.pt", (1, 1))
    assert main(["train", "--resume", "auto", "--epochs", "1"]) == 0
    assert "runs/b/last.pt has all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet18"], r"is a checkpoint of mobilenet_v3_small, and --model asks for resnet18"),
        (["--seed", "1"], r"--seed 1: .* was written with 0, which cannot change on --resume"),
        (["--opt", "adam"], r"--opt adam: .* was written with sgd"),
        (["--val-split", "0.5", "--epochs", "9"], r"or their split, are not those"),
    ],
)
def test_what_does_not_go_with_the_checkpoint(
    whole: Path, in_tmp: Path, refused: Refused, flags: list[str], message: str
) -> None:
    refused(["train", "--resume", str(whole), *flags, "--output", "run"], message)
    assert not Path("run").exists()


def test_other_images(whole: Path, own_photos: Path, in_tmp: Path, refused: Refused) -> None:
    command = ["train", "--resume", str(whole), "--data", str(own_photos), "--epochs", "9", "--output", "run"]
    refused(command, r"the images in .*photos, or their split, are not those that .*last\.pt was trained on")
    (own_photos / "dots").rename(own_photos / "spots")
    refused(command, r"was trained on the classes dots, stripes, and .*photos has spots, stripes")


def test_batches_may_not_change_within_an_epoch(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    with monkeypatch.context() as stopped:
        stop_after(stopped, 2, signal.SIGINT)
        assert main(arguments(photos, "--output", "run")) == 130
    refused(["train", "--resume", "run", "--batch-size", "8"], r"--batch-size 8: .* was written with 4")
