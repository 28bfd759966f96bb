"""The command, run for real on a handful of images: what it writes, prints and learns."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import MODEL, arguments, read_rows, untimed, write_images

from gradfast.cli import main
from gradfast.train.results.checkpoint import load_checkpoint
from gradfast.train.results.history import summary_columns
from gradfast.train.settings import read_yaml
from gradfast.train.tasks.classify import Classify

REQUIRED_COLUMNS = {
    *("epoch", "train_loss", "eval_loss", "eval_acc1", "eval_balanced_acc", "lr", "grad_norm", "grad_norm_max"),
    *("clip_fraction", "skipped_steps", "images_per_s", "seconds"),
}


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of three epochs, 20 images in 5 steps each."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(photos, "--epochs", 3, "--output", output)) == 0
    return output


def test_run_folder_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"summary.csv", "steps.csv", "config.yaml", "curves.png", "last.pt", "best.pt"}


def test_summary_has_a_row_per_epoch(finished: Path) -> None:
    rows = read_rows(finished / "summary.csv")
    assert list(rows[0]) == list(summary_columns(Classify())) and set(rows[0]) >= REQUIRED_COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        values = {name: float(value) for name, value in row.items()}
        assert all(math.isfinite(value) for value in values.values())
        assert 0 <= values["eval_acc1"] <= 1 and 0 <= values["eval_balanced_acc"] <= 1
        assert 0 <= values["clip_fraction"] <= 1 and values["skipped_steps"] == 0
        assert values["grad_norm_max"] >= values["grad_norm"] > 0 and values["seconds"] > 0


def test_summary_follows_from_the_steps(finished: Path) -> None:
    steps, rows = read_rows(finished / "steps.csv"), read_rows(finished / "summary.csv")
    assert [int(step["step"]) for step in steps] == list(range(1, 16))
    for row in rows:
        own = [step for step in steps if step["epoch"] == row["epoch"]]
        norms = [float(step["grad_norm"]) for step in own]
        assert float(row["train_loss"]) == pytest.approx(sum(float(step["loss"]) for step in own) / 5, rel=1e-12)
        assert float(row["grad_norm"]) == pytest.approx(sum(norms) / 5, rel=1e-12)
        assert float(row["grad_norm_max"]) == max(norms)
        assert float(row["clip_fraction"]) == sum(norm > 1 for norm in norms) / 5
        for step, norm in zip(own, norms):
            assert float(step["clip_coef"]) == pytest.approx(min(1.0, 1.0 / (norm + 1e-6)), rel=1e-6)


def test_curves_are_a_picture(finished: Path) -> None:
    with Image.open(finished / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width >= 1000 and picture.height >= 300
        assert len(set(picture.convert("L").tobytes())) > 20  # something is drawn


def test_saved_configuration_repeats_the_run(finished: Path, in_tmp: Path) -> None:
    settings = read_yaml(finished / "config.yaml")
    assert settings["model"] == MODEL and settings["lr"] == 0.05 and settings["clip_grad"] == 1.0
    assert main(["train", "-c", str(finished / "config.yaml"), "--output", "again"]) == 0
    assert untimed(Path("again/summary.csv")) == untimed(finished / "summary.csv")
    assert untimed(Path("again/steps.csv")) == untimed(finished / "steps.csv")


def test_checkpoints_are_of_the_last_and_the_best_epoch(finished: Path) -> None:
    scores = [float(row["eval_balanced_acc"]) for row in read_rows(finished / "summary.csv")]
    last, best = load_checkpoint(finished / "last.pt"), load_checkpoint(finished / "best.pt")
    assert last["position"]["epoch"] == 3
    assert best["position"]["epoch"] == scores.index(max(scores)) + 1 == last["best"]["epoch"]
    assert last["best"]["balanced_accuracy"] == max(scores)


def test_another_seed_is_another_run(finished: Path, photos: Path, in_tmp: Path) -> None:
    assert main(arguments(photos, "--epochs", 1, "--seed", 1, "--output", "other")) == 0
    assert untimed(Path("other/steps.csv"))[0]["loss"] != untimed(finished / "steps.csv")[0]["loss"]


def test_workers_change_nothing(finished: Path, photos: Path, in_tmp: Path) -> None:
    assert main(arguments(photos, "--epochs", 3, "--workers", 2, "--cache", "off", "--output", "workers")) == 0
    assert untimed(Path("workers/steps.csv")) == untimed(finished / "steps.csv")
    assert untimed(Path("workers/summary.csv")) == untimed(finished / "summary.csv")


def test_the_monitor_changes_nothing_and_its_run_can_be_drawn(finished: Path, photos: Path, in_tmp: Path) -> None:
    from gradfast.monitor.record import read_run

    assert main(arguments(photos, "--epochs", 3, "--output", "watched", "--monitor-every", 4)) == 0
    assert untimed(Path("watched/steps.csv")) == untimed(finished / "steps.csv")
    run = read_run(Path("watched"))
    assert sorted(run.samples) == [1, 4, 8, 12] and len(run.norms) == 15 and len(run.layers()) > 3
    assert main(["plot", "watched"]) == 0 and Path("watched/layers.png").is_file()


def test_default_output_is_a_new_folder_each_time(photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    for number in (1, 2):
        assert main(arguments(photos, "--epochs", 1)) == 0
        assert Path(f"runs/{MODEL}-photos-{number}/summary.csv").is_file()
    assert "guessing   accuracy" in capsys.readouterr().out


def test_resnet50_learns_dots_from_stripes(tmp_path: Path, in_tmp: Path) -> None:
    data = tmp_path / "data"
    write_images(data / "train", {"dots": 24, "stripes": 24}, seed=1)
    write_images(data / "val", {"dots": 10, "stripes": 10}, seed=2)
    command = ["--model", "resnet50", "--zero-init-residual", "--batch-size", 8, "--epochs", 3, "--augment", "flip"]
    command += ["--lr", 0.02, "--warmup-epochs", 0]
    assert main(arguments(data, *command, "--channels-last", "--output", "run")) == 0
    row = read_rows(Path("run/summary.csv"))[-1]
    # 20 held-out images: guessing gets 16 or more right once in 170 runs
    assert float(row["eval_acc1"]) >= 0.8 and float(row["eval_acc1"]) == float(row["eval_balanced_acc"])
    assert float(row["train_loss"]) < 0.6


def test_the_command_itself(photos: Path, in_tmp: Path) -> None:
    command = [sys.executable, "-m", "gradfast.train", *arguments(photos, "--epochs", 1)[1:], "--output", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "epoch 1/1  loss" in done.stdout and "\x1b" not in done.stdout
    bad = subprocess.run([*command, "--lr", "fast"], capture_output=True, text=True, timeout=300, check=False)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "gradfast: error: --lr: expected a number of at least 0, got 'fast'\n"


@pytest.mark.parametrize(
    "flags",
    [
        ("--opt", "adamw", "--lr", 0.001, "--sched", "cosine", "--warmup-epochs", 0.5),
        ("--opt", "adam", "--sched", "step", "--decay-epochs", 1, "--clip-grad", "off"),
        ("--clip-policy", "zclip", "--clip-grad", "off"),
        ("--clip-policy", "skip-spikes", "--opt", "adamw"),
        ("--clip-policy", "agc"),
        ("--clip-policy", "adagc"),
        ("--clip-policy", "value", "--clip-grad", 0.01),
        ("--opt", "lion", "--sched", "poly", "--no-norm-bias-decay", "--l1", 1e-5, "--model-ema"),
        ("--mixup", 0.2, "--cutmix", 1, "--auto-augment", "trivial", "--random-erase", 0.2, "--nesterov"),
        (
            "--sampler",
            "balanced",
            "--sched",
            "multistep",
            "--decay-milestones",
            1,
            "--drop-path",
            0.1,
            "--dropout",
            0.2,
        ),
        ("--activation", "gelu", "--init", "kaiming", "--sched", "plateau", "--patience", 0),
        ("--amp", "bf16", "--label-smoothing", 0.1, "--class-weights", "none", "--sched", "constant"),
        ("--grad-accum", 2, "--channels-last", "--augment", "crop", "--sched", "linear", "--workers", 1),
        ("--model", "resnet18", "--no-zero-init-residual", "--augment", "none", "--momentum", 0.8, "--epochs", 1),
    ],
)
def test_flags_in_company(photos: Path, in_tmp: Path, flags: tuple[object, ...]) -> None:
    assert main(arguments(photos, *flags, "--output", "run")) == 0
    rows = read_rows(Path("run/summary.csv"))
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    steps = read_rows(Path("run/steps.csv"))
    accumulated = "--grad-accum" in flags
    assert len(steps) == len(rows) * (3 if accumulated else 5)
    # five batches of four in pairs: the last step has what is left
    assert [int(step["images"]) for step in steps][:3] == ([8, 8, 4] if accumulated else [4, 4, 4])
    if "off" in flags and "zclip" not in flags:
        assert {step["clip_coef"] for step in steps} == {"1.0"}


def test_accumulated_gradients_are_the_mean_of_their_batches() -> None:
    from gradfast.train.config import TrainConfig
    from gradfast.train.data.batches import Batch
    from gradfast.train.machine.place import Place
    from gradfast.train.model.criterion import ClassificationLoss
    from gradfast.train.model.optimizers import build_optimizer
    from gradfast.train.step import Learner
    from gradfast.train.tasks.classify import ClassObjective

    torch.manual_seed(0)
    images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
    targets = torch.randint(2, (8,))
    place = Place(torch.device("cpu"))
    after = []
    for pieces in (1, 2, 4):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        learner = Learner(
            model,
            ClassObjective(ClassificationLoss(None, 0.0), 2, place),
            build_optimizer(TrainConfig(lr=0.1, clip_grad=None).resolve(), model),
            torch.amp.GradScaler("cpu", enabled=False),
            place,
        )
        batches = [Batch(a, b, []) for a, b in zip(images.chunk(pieces), targets.chunk(pieces))]
        result = learner.step(batches)
        assert result is not None and result.images == 8
        after.append((float(result.loss), model[1].weight.detach().clone()))
    for loss, weight in after[1:]:
        assert loss == pytest.approx(after[0][0], rel=1e-5)
        # float32 sums in another order: a few ulps of the largest weight
        torch.testing.assert_close(weight, after[0][1], rtol=1e-5, atol=1e-6)


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(photos: Path, in_tmp: Path) -> None:
    pty = pytest.importorskip("pty")
    import os

    command = [sys.executable, "-m", "gradfast", *arguments(photos, "--epochs", 1), "--output", "run"]
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    assert process.wait(timeout=300) == 0
    text = shown.decode()
    assert "\x1b[" in text and "epoch 1/1" in text and "5/5" in text
    assert "done       1 epochs" in text
