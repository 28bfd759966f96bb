"""Recipes: every one can be used, says what it is, and gives way to flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from gradfast.train.cli import build_parser, read_settings
from gradfast.train.config import TrainConfig
from gradfast.train.recipes import find_recipe, recipes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_made_of_known_settings_that_go_together(name: str) -> None:
    config = TrainConfig(**read_settings(["--recipe", name])).resolve()
    for field, value in read_settings(["--recipe", name]).items():
        assert getattr(config, field) == value
    description = find_recipe(name).read_text().splitlines()[0]
    assert description.startswith("# ") and description.removeprefix("# ") in build_parser().format_help()


def test_the_recipe_of_the_default_run_is_the_default() -> None:
    assert TrainConfig(**read_settings(["--recipe", "solar-cells"])).resolve() == TrainConfig().resolve()


def test_files_override_recipes_and_flags_override_files(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("lr: 0.3\nepochs: 5\n")
    settings = read_settings(["--recipe", "resnet50-torchvision-v1", "-c", str(tmp_path / "own.yaml"), "--epochs", "2"])
    assert (settings["lr"], settings["epochs"], settings["batch_size"]) == (0.3, 2, 256)
    assert settings["clip_grad"] is None and settings["class_weights"] == "none"


def test_learning_rate_of_the_first_recipe_drops_as_torchvisions_did() -> None:
    from gradfast.train.schedule import build_schedule

    schedule = build_schedule(TrainConfig(**read_settings(["--recipe", "resnet50-torchvision-v1"])).resolve(), 10)
    rates = [schedule.rate(epoch * 10) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


def test_unknown_recipe(refused: Callable[[list[str], str], str]) -> None:
    refused(["train", "--recipe", "tinny"], r"--recipe: there is no recipe 'tinny'; did you mean tiny\?")


def test_a_recipe_is_run(photos: Path, in_tmp: Path) -> None:
    pytest.importorskip("torchvision", exc_type=Exception)
    from gradfast.cli import main
    from gradfast.train.settings import read_yaml

    command = ["train", "--recipe", "tiny", "--data", str(photos), "--epochs", "1", "--batch-size", "4"]
    assert main([*command, "--device", "cpu", "--output", "run"]) == 0
    saved = read_yaml(Path("run/config.yaml"))
    assert (saved["model"], saved["img_size"], saved["epochs"]) == ("resnet18", 32, 1)
