"""--log: the same numbers everywhere, no step twice after a resume, nothing lost in a crash."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

from train.cases import Break, arguments, read_rows

from gradfast.cli import main
from gradfast.train.config import TrainConfig
from gradfast.train.results.logs import LOG, RunLog
from gradfast.train.settings import check_value, read_yaml
from gradfast.train.step import Learner


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / LOG).read_text().splitlines()]


def scalars(folder: str, tag: str) -> dict[int, list[float]]:
    """What TensorBoard shows: step -> values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, list[float]] = {}
    for event in EventAccumulator(folder).Reload().Scalars(tag):
        found.setdefault(event.step, []).append(event.value)
    return found


def check_against_tables(folder: str) -> None:
    """Every step and epoch of the tables is in both logs, once, with the same numbers."""
    steps, epochs = read_rows(Path(folder) / "steps.csv"), read_rows(Path(folder) / "summary.csv")
    logged = [line for line in lines(folder) if "train/loss" in line]
    assert [line["step"] for line in logged] == [int(row["step"]) for row in steps]
    for line, row in zip(logged, steps):
        for name in ("loss", "grad_norm", "clip_coef", "lr"):
            assert line[f"train/{name}"] == float(row[name])
        assert line["train/grad_norm_clipped"] == float(row["grad_norm"]) * float(row["clip_coef"])
        assert line["train/images_per_s"] == pytest.approx(float(row["images"]) / float(row["seconds"]))
    last = {row["epoch"]: int(row["step"]) for row in steps}
    kept = [line for line in lines(folder) if "epoch/epoch" in line]
    assert [(line["epoch/epoch"], line["step"]) for line in kept] == [(int(e), step) for e, step in last.items()]
    assert [line["epoch/eval_acc1"] for line in kept] == [float(row["eval_acc1"]) for row in epochs]

    for tag, rows in (("train/loss", steps), ("train/lr", steps)):
        column = tag.removeprefix("train/")
        shown = scalars(folder, tag)
        assert {
            step: pytest.approx([float(row[column])], rel=1e-6) for step, row in zip(map(int, last_of(rows)), rows)
        } == (shown)
    shown = scalars(folder, "epoch/eval_balanced_acc")
    assert {step: len(values) for step, values in shown.items()} == dict.fromkeys(last.values(), 1)


def last_of(rows: list[dict[str, str]]) -> list[str]:
    return [row["step"] for row in rows]


def test_a_run_and_its_resumption_share_their_logs(photos: Path, in_tmp: Path) -> None:
    pytest.importorskip("tensorboard")
    command = arguments(photos, "--log", "jsonl,tensorboard", "--sched", "constant", "--epochs", 2, "--output", "run")
    assert main(command) == 0
    assert read_yaml(Path("run/config.yaml"))["log"] == "csv,jsonl,tensorboard"
    check_against_tables("run")
    assert main(["train", "--resume", "run", "--epochs", "3"]) == 0
    assert len(read_rows(Path("run/steps.csv"))) == 15
    check_against_tables("run")


def test_what_was_logged_after_the_last_checkpoint_is_not_doubled(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    step, count = Learner.step, 0

    def crash(self: Learner, batches: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise MemoryError("the ninth step")
        return step(self, batches)

    command = arguments(photos, "--log", "jsonl,tensorboard", "--epochs", 3, "--output", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", crash)
        with pytest.raises(MemoryError):
            main(command)
    # The steps since the checkpoint were flushed on the way out, though no table has them yet.
    assert [line["step"] for line in lines("run") if "train/loss" in line] == list(range(1, 9))
    assert sorted(scalars("run", "train/loss")) == list(range(1, 9)) and len(read_rows(Path("run/steps.csv"))) == 5
    with (Path("run") / LOG).open("a") as file:
        file.write('{"step": 9, "train/lo')  # as a kill would leave it
    assert main(["train", "--resume", "run"]) == 0
    check_against_tables("run")


def test_events_are_logged_too(photos: Path, in_tmp: Path, broken: Break) -> None:
    broken(lambda number: math.nan if number == 2 else 1.0)
    assert main(arguments(photos, "--log", "jsonl", "--output", "run")) == 0
    [event] = [line["event"] for line in lines("run") if "event" in line]
    assert (event["step"], event["action"]) == (3, "skipped")
    assert event == json.loads((Path("run") / "events.jsonl").read_text())


def test_weights_and_biases_goes_on_with_the_same_run(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the calls that are made of it; the package itself needs an account."""
    fake: Any = types.ModuleType("wandb")
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    fake.run = None
    fake.init = lambda **options: begun.append(options)
    fake.log = lambda metrics, step: logged.append((step, metrics))
    fake.finish = lambda: begun.append({"finished": True})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main(arguments(photos, "--log", "wandb", "--epochs", 1, "--output", "run")) == 0
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    starts = [options for options in begun if "id" in options]
    name = (Path("run") / "wandb-id.txt").read_text()
    assert re.fullmatch(r"\w{8}", name)
    assert [(each["id"], each["resume"], each["name"]) for each in starts] == [(name, "allow", "run")] * 2
    assert len(begun) == 4 and starts[0]["config"]["epochs"] == 1
    assert [step for step, metrics in logged if "train/loss" in metrics] == list(range(1, 11))
    assert [step for step, metrics in logged if "epoch/eval_loss" in metrics] == [5, 10]


def test_what_is_not_installed_or_not_known(
    photos: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str], str], str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(
        arguments(photos, "--log", "wandb"),
        r"--log wandb needs the package 'wandb', .*: pip install 'gradfast\[wandb\]'",
    )
    refused(
        arguments(photos, "--log", "csv,tb"), "expected csv, jsonl, tensorboard, wandb with commas between, got 'tb'"
    )
    assert list(in_tmp.iterdir()) == []
    assert check_value("log", "wandb, jsonl", "--log") == "csv,jsonl,wandb"
    assert check_value("log", "none", "--log") == "csv"


def test_a_folder_of_its_own_takes_the_earlier_lines_along(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    content: list[dict[str, Any]] = [{"step": step, "train/loss": 1.0} for step in range(1, 13)]
    content.insert(5, {"step": 5, "epoch/epoch": 1})
    content.insert(11, {"step": 10, "epoch/epoch": 2})
    content.append({"event": {"step": 12}})
    (old / LOG).write_text("".join(json.dumps(line) + "\n" for line in content))
    log = RunLog()
    log.open(new, old, 10, 1, TrainConfig(log="csv,jsonl"))  # all steps of the second epoch, not its evaluation
    log.close()
    kept = lines(str(new))
    assert [line["step"] for line in kept if "train/loss" in line] == list(range(1, 11))
    assert [line["step"] for line in kept if "epoch/epoch" in line] == [5] and len(kept) == 11
