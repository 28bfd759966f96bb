"""Where the time goes: phases by a clock that the test turns, and the advice where images come too slowly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
from train.cases import arguments, read_rows

from gradfast.cli import main
from gradfast.train import stopwatch, trainer
from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import ImageDataset
from gradfast.train.results import report
from gradfast.train.results.tally import Tally
from gradfast.train.stopwatch import PHASES, Span, Stopwatch, durations


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_time_between_two_marks_is_the_later_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    watch = Stopwatch(torch.device("cpu"))
    clock.now += 50.0
    watch.begin()
    tally = Tally()
    for data in (4.0, 1.0):
        for phase, seconds in (("data", data), ("forward", 2.0), ("backward", 3.0), ("forward", 2.0), ("step", 1.0)):
            clock.now += seconds
            watch.lap(phase)
        tally.add(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0), 0.1, 4, spans=watch.take())
        clock.now += 0.5
        watch.lap("other")
    tally.drain()
    assert tally.columns["seconds"] == [12.0, 9.5]  # saving after the first step came before the second
    assert tally.phases == {"data": 5.0, "forward": 8.0, "backward": 6.0, "step": 2.0, "other": 0.5}
    assert tally.share("data") == 5.0 / 21.5 and Tally().share("data") == 0.0
    copy = Tally()
    copy.load_state_dict(tally.state_dict())
    assert copy.phases == tally.phases and copy.columns == tally.columns


def test_on_a_device_events_are_asked_once_and_later() -> None:
    class Event:
        def __init__(self, milliseconds: float) -> None:
            self.milliseconds = milliseconds

        def elapsed_time(self, other: Event) -> float:
            return other.milliseconds - self.milliseconds

    first, second, third = Event(10.0), Event(250.0), Event(1000.0)
    assert durations([Span("data", first, second), Span("forward", second, third)]) == {"data": 0.24, "forward": 0.75}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.cuda
def test_the_devices_own_time_is_measured_without_waiting() -> None:
    watch = Stopwatch(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    watch.begin()
    begin = time.perf_counter()
    for _ in range(20):
        x @ x
    watch.lap("forward")
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    seconds = durations(watch.take())["forward"]
    assert launched < 0.5 * whole and 0.5 * whole < seconds <= whole


def test_shares_are_in_the_table_and_on_the_terminal(
    photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(photos, "--output", "run")) == 0
    out = capsys.readouterr().out
    assert "images/s (data " in out and ", backward " in out and "time       data " in out and "of the steps" in out
    for row in read_rows(Path("run/summary.csv")):
        shares = [float(row[f"{phase}_share"]) for phase in PHASES]
        assert all(0 <= share <= 1 for share in shares) and 0.5 < sum(shares) <= 1.001
        assert shares[2] > shares[0]  # images in memory: backward takes longer than the wait for them
    steps = [float(row["seconds"]) for row in read_rows(Path("run/steps.csv"))]
    assert len(steps) == 10 and all(seconds > 0 for seconds in steps)
    assert "advice" not in out


def test_a_slow_loader_is_told_of_once(
    photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ImageDataset.load

    def slowly(self: ImageDataset, index: int) -> Any:
        time.sleep(0.05)
        return load(self, index)

    monkeypatch.setattr(ImageDataset, "load", slowly)
    monkeypatch.setattr(trainer, "STEPS_TO_JUDGE", 5)
    monkeypatch.setattr(report, "usable_cores", lambda: 4)
    assert main(arguments(photos, "--cache", "off", "--workers", 0, "--output", "run")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice ")]
    assert "by waiting for images" in line and "--workers 2 (now 0), or --cache on" in line
    assert "smaller files (the model sees 32 pixels)" in line
    assert float(read_rows(Path("run/summary.csv"))[0]["data_share"]) > 0.5


def test_advice_names_what_is_not_done_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "usable_cores", lambda: 8)
    slow, quick = {"data_share": 0.4}, {"data_share": 0.2}
    text = report.advise_loading(slow, TrainConfig(augment="crop", img_size=224), 8)
    assert text is not None and "--workers" not in text and "--cache" not in text and "224 pixels" in text
    assert "--workers 8 (now 6)" in str(report.advise_loading(slow, TrainConfig(), 6))
    assert report.advise_loading(quick, TrainConfig(), 0) is None
    assert report.advise_loading({"data_share": float("nan")}, TrainConfig(), 0) is None
