"""`gradfast plot`: pictures and one page from a run, and clear words for a run that is not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfast
from gradfast.cli import main
from gradfast.errors import UserError
from gradfast.monitor import JSONL, Monitor
from gradfast.monitor.record import read_run

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def record(folder: Path, steps: int = 40, start: int = 0) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = gradfast.SGD(model.named_parameters(), lr=0.1, max_norm=1.0)
    with Monitor(optimizer, model, every=5, sinks=[JSONL(folder)], start_step=start):
        for step in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) * (100 if step == 30 else 1)
            if step == 20:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.step()


def test_pictures_and_a_page_that_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    assert main(["plot", str(tmp_path)]) == 0
    written = capsys.readouterr().out.split()
    assert {Path(path).name for path in written} == {
        "norms.png",
        "layers.png",
        "updates.png",
        "distribution.png",
        "report.html",
    }
    assert all(Path(path).read_bytes().startswith(PNG) for path in written if path.endswith("png"))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http://" not in page and "https://" not in page
    assert "40 steps; 1 with a non-finite norm" in page and "step 21: the gradient norm is nan" in page


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    record(tmp_path)
    run = read_run(tmp_path)
    assert sorted(run.norms) == list(range(1, 41)) and math.isnan(run.norms[21])
    assert set(run.layers()) == {"0", "2"} and sorted(run.layers()["0"]) == [1, *range(5, 41, 5)]
    assert [(event["step"], event["rule"]) for event in run.events] == [(21, "nonfinite"), (31, "spike")]


def test_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, steps=10, start=35)
    assert sorted(read_run(tmp_path).norms) == list(range(1, 46))


def test_run_of_gradfast_train(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text(
        "epoch,step,loss,grad_norm,clip_coef,lr,images\n1,1,2.5,3.0,0.3,0.1,8\n1,2,nan,nan,1.0,0.1,8\n1,3,2.4,2.0,0.5,0.1,8\n"
    )
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "norms.png").is_file() and not (tmp_path / "out" / "layers.png").exists()
    assert read_run(tmp_path).events[0]["step"] == 2


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    record(tmp_path)
    path = tmp_path / "monitor.jsonl"
    path.write_text(path.read_text() + '{"step": 45, "grad_n')
    assert len(read_run(tmp_path).norms) == 40


@pytest.mark.parametrize(
    ("content", "pattern"),
    [(None, "there is no run"), ({}, "neither monitor.jsonl nor steps.csv"), ({"monitor.jsonl": ""}, "is empty")],
)
def test_missing_and_empty_runs(tmp_path: Path, content: dict | None, pattern: str) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=pattern):
        read_run(folder)
    assert main(["plot", str(folder)]) == 2


def test_damaged_runs(tmp_path: Path) -> None:
    (tmp_path / "monitor.jsonl").write_text("garbage\n" + json.dumps({"step": 1, "grad_norm": 1.0}) + "\n")
    with pytest.raises(UserError, match="line 1, is damaged"):
        read_run(tmp_path)
    (tmp_path / "monitor.jsonl").unlink()
    (tmp_path / "steps.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"steps\.csv is not a table"):
        read_run(tmp_path)
