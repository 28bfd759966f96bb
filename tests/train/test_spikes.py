"""--on-spike: a run is broken in each way, and does what each value says, and says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from train.cases import Break, arguments, read_rows, untimed

from gradfast.cli import main
from gradfast.train import spikes
from gradfast.train.results.checkpoint import load_checkpoint


def events(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / spikes.EVENTS).read_text().splitlines()]


def run(photos: Path, output: str, *more: object) -> int:
    return main(arguments(photos, "--sched", "constant", "--warmup-epochs", 0, *more, "--output", output))


def test_the_default_skips_tells_and_changes_nothing_else(
    photos: Path, in_tmp: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(lambda number: math.nan if number == 2 else 1.0)
    assert run(photos, "skip") == 0
    [event] = events("skip")
    assert (event["step"], event["rule"], event["norm"], event["action"]) == (3, "nonfinite", "nan", "skipped")
    assert len(event["worst"]) == 3 and event["worst"][0][1] == "nan"
    out = capsys.readouterr().out
    assert "event      step 3 skipped by nonfinite: gradient norm nan" in out and "skipped steps 1" in out
    assert run(photos, "none", "--on-spike", "none") == 0
    assert not (Path("none") / spikes.EVENTS).exists() and "event " not in capsys.readouterr().out
    assert untimed(Path("none/steps.csv")) == untimed(Path("skip/steps.csv"))


def test_back_off_lowers_the_rate_and_lets_it_recover(photos: Path, in_tmp: Path, broken: Break) -> None:
    broken(lambda number: 1e4 if number == 21 else math.nan if number == 23 else 1.0)
    assert run(photos, "whole", "--epochs", 6, "--on-spike", "backoff", "--lr", 0.01) == 0
    spike, nonfinite = events("whole")
    assert (spike["step"], spike["rule"], spike["action"]) == (22, "spike", "clipped")
    assert spike["norm"] > spike["threshold"] > 0
    assert (nonfinite["step"], nonfinite["action"]) == (24, "skipped")
    rates = [float(row["lr"]) for row in read_rows(Path("whole/steps.csv"))]
    recovery = 0.5 ** (-1 / 100)
    expected = [0.01] * 22 + [0.01 * 0.5, 0.01 * 0.5 * recovery, 0.01 * 0.5 * recovery * 0.5]
    assert rates[:25] == pytest.approx(expected, rel=1e-12)
    assert rates[29] == pytest.approx(expected[-1] * recovery**5, rel=1e-12)

    # Interrupted after the spike and resumed, the rate recovers the same way.
    assert run(photos, "half", "--epochs", 5, "--on-spike", "backoff", "--lr", 0.01) == 0
    with (Path("half") / spikes.EVENTS).open("a") as file:
        file.write('{"step": 26, "rule": "spike"}\n{"step": 2')  # of steps that will be done again, and half a line
    assert main(["train", "--resume", "half", "--epochs", "6"]) == 0
    assert untimed(Path("half/steps.csv")) == untimed(Path("whole/steps.csv"))
    assert events("half") == events("whole")


def test_the_rate_of_a_step_is_the_lowered_one(
    photos: Path, in_tmp: Path, broken: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradfast

    seen = []
    step = gradfast.SGD.step

    def watched(self: gradfast.SGD, *args: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(gradfast.SGD, "step", watched)
    broken(lambda number: math.nan if number == 3 else 1.0)
    assert run(photos, "run", "--on-spike", "backoff", "--lr", 0.01, "--epochs", 1) == 0
    assert seen == [float(row["lr"]) for row in read_rows(Path("run/steps.csv"))] == [0.01] * 4 + [0.005]


def test_a_run_of_skipped_steps_is_rolled_back_and_goes_on_behind_them(
    photos: Path, in_tmp: Path, broken: Break, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spikes, "SNAPSHOT_EVERY", 3)
    monkeypatch.setattr(spikes, "SKIPS_IN_A_ROW", 4)
    taken: dict[int, dict[str, torch.Tensor]] = {}
    take = spikes.SnapshotRing.take

    def remember(self: spikes.SnapshotRing, step: int, parts: dict[str, Any]) -> None:
        taken[step] = {name: value.clone() for name, value in parts["model"].state_dict().items()}
        take(self, step, parts)

    monkeypatch.setattr(spikes.SnapshotRing, "take", remember)
    broken(lambda number: math.nan if 7 <= number < 11 else 1.0)
    more = ["--on-spike", "rollback", "--model-ema", "--keep", 20, "--save-every-steps", 1]
    assert run(photos, "run", *more, "--epochs", 3) == 0
    happened = [(event["step"], event["action"]) for event in events("run")]
    assert happened == [(8, "skipped"), (9, "skipped"), (10, "skipped"), (11, "skipped"), (11, "rolled back")]
    assert "4 steps in a row were skipped; rolled back to step 6 (1 of 3)" in capsys.readouterr().out
    after = load_checkpoint(Path("run/step-00000011.pt"))
    assert all(torch.equal(after["model"][name], value) for name, value in taken[6].items())
    assert after["guard"]["rollbacks"] == 1
    rows = read_rows(Path("run/steps.csv"))
    assert len(rows) == 15 and all(math.isfinite(float(row["loss"])) for row in rows[11:])
    assert float(rows[11]["lr"]) < 0.01  # warmed up anew


def test_a_loss_that_left_its_course_is_rolled_back(photos: Path, in_tmp: Path, broken: Break) -> None:
    broken(lambda number: 50.0 if 40 <= number < 50 else 1.0)
    assert run(photos, "run", "--on-spike", "rollback", "--epochs", 11, "--lr", 0.001) == 0
    [rolled] = [event for event in events("run") if event["action"] == "rolled back"]
    assert (rolled["step"], rolled["rule"]) == (50, "loss") and "rolled back to step 0" in rolled["message"]


@pytest.mark.parametrize(("value", "rollbacks"), [("rollback", 3), ("backoff", 0), ("skip", 0)])
def test_a_run_that_does_not_recover_is_stopped_with_a_report(
    value: str,
    rollbacks: int,
    photos: Path,
    in_tmp: Path,
    broken: Break,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[list[str], str], str],
) -> None:
    monkeypatch.setattr(spikes, "SKIPS_IN_A_ROW", 2)
    broken(lambda number: math.nan if number >= 6 else 1.0)
    command = arguments(photos, "--on-spike", value, "--epochs", 4, "--output", "run")
    error = refused(
        command,
        r"epoch \d: training stopped at step \d+: 2 steps in a row were skipped.*; run/events\.jsonl has what led to "
        r"it\. Start again with a lower --lr .*\(the last checkpoint is run/last\.pt, after \d epochs\)",
    )
    assert ("the run was rolled back 3 times already" in error) == (value == "rollback") and "SnapshotRing" not in error
    actions = [event["action"] for event in events("run")]
    assert actions.count("rolled back") == rollbacks and actions[-1] == "stopped"
    assert actions.count("skipped") == 2 * (rollbacks + 1)


def test_back_off_does_not_go_with_the_search_for_a_loss_scale(
    photos: Path, in_tmp: Path, refused: Callable[[list[str], str], str]
) -> None:
    refused(
        arguments(photos, "--amp", "fp16", "--on-spike", "backoff"), "--on-spike backoff takes the steps that --amp"
    )


def test_the_terminal_is_not_flooded(
    photos: Path, in_tmp: Path, broken: Break, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikes, "LINES_SHOWN", 3)
    broken(lambda number: math.nan if number % 2 else 1.0)
    assert run(photos, "run", "--epochs", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("event ")]
    assert len(lines) == 4 and "further ones are in run/events.jsonl" in lines[-1] and len(events("run")) == 7
