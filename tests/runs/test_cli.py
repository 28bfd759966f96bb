"""`gradfast runs`: what its tables say, and that they fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("yaml", exc_type=Exception)
pytest.importorskip("rich", exc_type=Exception)
pytest.importorskip("torchvision", exc_type=Exception)

from runs.cases import write_run

from gradfast.cli import main
from gradfast.runs.listing import COLUMNS, fit
from gradfast.runs.text import ellipsis, short_age, short_duration


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/ of a folder that is the current one: a finished run, a stopped one, and what one left that died at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    write_run(Path("runs/first"), [0.5, 0.75, 0.625])
    write_run(Path("runs/second"), [0.875], lr=0.1, opt="adamw")
    (tmp_path / "runs/died").mkdir()
    os.utime("runs/first/summary.csv", (0, 0))
    for name in ("first", "second"):
        for path in Path("runs", name).iterdir():
            os.utime(path, (1000, 1000) if name == "first" else (2000, 2000))
    return tmp_path / "runs"


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["runs", *arguments]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heading, titles, *rows = lines(capsys)
    assert heading == "all: task classify, model resnet50, data elpv"
    assert titles.split() == ["name", "state", *("epochs", "best", "loss", "norm", "clip", "skip", "time", "age")]
    assert rows[0].split()[:-1] == ["second", "stopped", "1/3", "0.875", "@1", "1.000", "10", "50%", "1", "40s"]
    assert rows[1].split()[:-1] == ["first", "finished", "3/3", "0.750", "@2", "0.333", "30", "50%", "3", "2m00"]
    assert rows[2].split() == ["died", "broken", "0/?", *"-------"]
    assert rows[3:] == ["runs/died: no config.yaml", "runs/died: no summary.csv"]


def test_long_names_fit_and_plain_text_has_no_escapes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / ("a-very-long-name-of-a-run-" * 3 + "1"), [0.5], model="efficientnet_v2_s", data="/" + "d" * 60)
    table = lines(capsys)[:5]
    assert max(map(len, table)) <= 100 and "\x1b" not in "".join(table)
    assert any("…" in line and "…-run-1" not in line for line in table)


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("best", "second first died"),
        ("loss", "first second died"),
        ("name", "died first second"),
        ("norm", "first second died"),
    ],
)
def test_order(column: str, order: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split()[0] for line in lines(capsys, "--sort", column)[2:5]] == order.split()


def test_the_width_of_plain_text(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(runs / ("long-" * 30), [0.5])
    for columns, width in (("80", 80), ("120", 120), ("wide", 100), ("0", 100), ("", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert width - 2 <= max(map(len, lines(capsys)[:5])) <= width, columns


def test_json_and_limit(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "diverged", [float("nan")])
    found = json.loads("\n".join(lines(capsys, "--json", "--sort", "name")), parse_constant=pytest.fail)
    assert [run["name"] for run in found] == ["died", "diverged", "first", "second"]
    assert found[0]["state"] == "broken" and found[0]["best"] is None and len(found[0]["problems"]) == 2
    assert found[1]["last"]["eval_balanced_acc"] is None
    assert found[2]["best"] == {"metric": "eval_balanced_acc", "value": 0.75, "epoch": 2}
    assert found[2]["norm"] == 30.0 and found[2]["epochs_planned"] == 3 and found[2]["time"] == 120
    (first,) = json.loads("\n".join(lines(capsys, "--json", "--sort", "name", "--limit", "1")))
    assert first == found[0]


def test_comparison_shows_what_differs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split("  ")[0]: line.split()[-2:] for line in lines(capsys, "first", "runs/second") if line}
    assert rows["lr"] == ["0.05", "0.1"] and rows["opt"] == ["set)", "adamw"]
    assert "model" not in rows and "seed" not in rows
    assert rows["best"] == ["accuracy", "0.8750"] and rows["best epoch"] == ["2", "1"]
    assert rows["last eval_balanced_acc"] == ["0.6250", "0.8750"] and rows["largest norm"] == ["30", "10"]


def test_many_runs_are_compared_in_tables_that_fit(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(write_run(runs / f"run-{number}", [0.5], lr=number)) for number in range(9)]
    table = lines(capsys, *names)
    assert max(map(len, table)) <= 100
    assert sum(line.startswith("lr ") for line in table) == 3
    assert [value for line in table if line.startswith("lr ") for value in line.split()[1:]] == list("012345678")


def test_comparison_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads("\n".join(lines(capsys, "first", "second", "--json")))
    assert found["settings"] == {"lr": [0.05, 0.1], "opt": [None, "adamw"]}
    assert [run["name"] for run in found["runs"]] == ["first", "second"]


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "there is no folder runs here" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert lines(capsys) == ["no runs in runs"]
    assert main(["runs", "none"]) == 2 and "there is no folder none" in capsys.readouterr().err
    assert main(["runs", "--sort", "x"]) == 2 and "--sort: expected one of name, " in capsys.readouterr().err
    assert main(["runs", "--limit", "0"]) == 2 and "--limit: expected" in capsys.readouterr().err


def test_texts() -> None:
    assert [short_duration(value) for value in (None, 59.4, 65, 7800, 86400 * 4 + 3600 * 3)] == [
        *("-", "59s", "1m05", "2h10", "4d03")
    ]
    assert [short_age(value) for value in (None, 59.9, 60, 7199, 86400)] == ["-", "59s", "1m", "1h", "1d"]
    assert ellipsis("resnet50-elpv-12", 9) == "resn…v-12" and ellipsis("short", 5) == "short"


def test_only_columns_that_may_be_cut_are_cut() -> None:
    cells = {name: ["x" * 30] for name in COLUMNS}
    widths = {name: len(texts[0]) for name, texts in fit(cells, 10).items()}
    assert widths == {name: COLUMNS[name].least or 30 for name in COLUMNS}
