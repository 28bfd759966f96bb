"""--lr-find: what it reads off a curve that is known, and a run of it that leaves no trace but its own files."""

from __future__ import annotations

import copy
import math
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from PIL import Image
from train.cases import arguments, read_rows

from gradfast.cli import main
from gradfast.train.cli import read_settings
from gradfast.train.config import make_config
from gradfast.train.lr_find import HIGHEST, LOWEST, RangeTest, range_test
from gradfast.train.run import build_learner
from gradfast.train.settings import to_command
from gradfast.train.step import Learner
from gradfast.train.tasks import find_task


def curve(loss_of: Callable[[float], float], steps: int = 101) -> RangeTest:
    """A test without noise, whose running mean is the loss itself."""
    rates = [LOWEST * (HIGHEST / LOWEST) ** (n / (steps - 1)) for n in range(steps)]
    losses = [loss_of(rate) for rate in rates]
    return RangeTest(rates, losses, losses, False)


def test_a_tenth_of_the_lowest_and_the_steepest_of_a_known_curve() -> None:
    # In u = ln(rate): 2 - tanh(u - ln 0.01) falls fastest at 0.01; the second term turns it up, lowest where
    # 1 / cosh(u - ln 0.01)^2 = rate, that is at about 0.04.
    found = curve(lambda rate: 2 - math.tanh(math.log(rate / 0.01)) + rate)
    lowest = min((r / 1e4 for r in range(1, 10000)), key=lambda r: 2 - math.tanh(math.log(r / 0.01)) + r)
    assert found.rates[found.lowest()] == pytest.approx(lowest, rel=0.1)
    assert found.suggestion() == pytest.approx(lowest / 10, rel=0.12)
    assert found.steepest() == pytest.approx(0.01, rel=0.1)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    assert curve(lambda rate: 1 + rate).suggestion() is None
    assert RangeTest([], [], [], True).suggestion() is None


def learner_of(photos: Path, *more: object) -> tuple[Learner, Any]:
    config = make_config(read_settings(arguments(photos, "--model-ema", "--clip-policy", "zclip", *more)[1:]))
    task = find_task("classify")
    data = task.build_data(config, lambda text: None)
    return build_learner(task, config, data, torch.device("cpu")), data.loaders(config, False)[0]


def test_the_learner_is_as_it_was_to_the_bit(photos: Path) -> None:
    learner, loader = learner_of(photos)
    learner.begin_epoch(0)
    for batch in loader.epoch(0):  # some momentum, and a policy with a past
        learner.step([batch])
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    found = range_test(learner, loader.epoch, steps=40)
    assert len(found.rates) >= 20 and found.rates[0] == LOWEST
    assert found.rates[1] / found.rates[0] == pytest.approx((HIGHEST / LOWEST) ** (1 / 39))
    after = learner.state_dict()
    assert torch.equal(random, torch.get_rng_state())

    def compare(one: Any, two: Any) -> None:
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two)
        elif isinstance(one, dict):
            assert one.keys() == two.keys()
            for key in one:
                compare(one[key], two[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(two)
            for each, other in zip(one, two):
                compare(each, other)
        else:
            assert one == two

    compare(before, after)
    # The running mean, without the bias of its start.
    mean = 0.0
    for number, (loss, smoothed) in enumerate(zip(found.losses, found.smoothed), start=1):
        mean = 0.9 * mean + 0.1 * loss
        assert smoothed == pytest.approx(mean / (1 - 0.9**number), rel=1e-12)


def test_it_stops_where_the_loss_bursts(photos: Path) -> None:
    learner, loader = learner_of(photos, "--clip-policy", "norm", "--clip-grad", "off", "--momentum", 0.99)
    found = range_test(learner, loader.epoch, steps=60)
    assert found.diverged and len(found.rates) < 60 and found.rates[-1] < HIGHEST


def test_the_command_writes_draws_and_suggests_a_command_that_runs(
    photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str], str], str]
) -> None:
    command = arguments(photos, "--no-norm-bias-decay", "--epochs", 1, "--lr", 7)
    assert main([*command, "--lr-find", "60"]) == 0
    out = capsys.readouterr().out
    folder = next(Path("runs").iterdir())
    assert {path.name for path in folder.iterdir()} == {"lr_find.csv", "lr_find.png"}
    rows = read_rows(folder / "lr_find.csv")
    assert list(rows[0]) == ["step", "lr", "loss", "smoothed"] and 20 <= len(rows) <= 60
    with Image.open(folder / "lr_find.png") as picture:
        assert picture.format == "PNG" and len(set(picture.convert("L").tobytes())) > 20
    start = next(line for line in out.splitlines() if line.startswith("start"))
    words = shlex.split(start.removeprefix("start").strip())
    assert words[:2] == ["gradfast", "train"] and "--lr-find" not in words and words.count("--lr") == 1
    assert f"suggestion --lr {words[-1]}: a tenth of" in out and "Smith 2017" in out
    assert main(words[1:]) == 0
    assert {path.name for path in folder.iterdir()} > {"lr_find.png", "summary.csv", "best.pt"}
    settings = read_settings(words[2:])
    assert settings["norm_bias_decay"] is False and settings["epochs"] == 1
    refused(words[1:], "is not empty")
    refused(["train", "--resume", str(folder), "--lr-find"], "--lr-find tests the start of a run")
    refused([*command, "--lr-find", "5"], "seven decades of rates take 20 steps at least")


def test_stopped_by_a_signal_it_says_so_and_writes_nothing(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = Learner.step, []

    def stopping(self: Learner, batches: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(Learner, "step", stopping)
    assert main(arguments(photos, "--lr-find", 60)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after 3 steps; nothing was written" in capsys.readouterr().out
    assert list(in_tmp.iterdir()) == []


def test_a_command_of_settings_reads_back() -> None:
    settings = {"data": "two words", "clip_grad": None, "lr": 1e-05, "model_ema": True, "norm_bias_decay": False}
    assert to_command(settings).startswith("gradfast train --data 'two words' --clip-grad off --lr 1e-05 --model-ema")
    assert read_settings(shlex.split(to_command(settings))[2:]) == settings
