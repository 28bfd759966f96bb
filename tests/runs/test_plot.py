"""`gradfast plot A B`: several runs in one picture, and what of each is in it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml", exc_type=Exception)
pytest.importorskip("matplotlib", exc_type=Exception)
pytest.importorskip("torchvision", exc_type=Exception)

from runs.cases import write_run

from gradfast.cli import main
from gradfast.runs.overlay import draw_overlay, make_labels, read_curves, running_mean

PNG = b"\x89PNG\r\n\x1a\n"


def drawn(axes: object) -> list[list[float]]:
    """The ordinates of each line."""
    return [list(map(float, line.get_ydata())) for line in axes.lines]  # type: ignore[attr-defined]


def test_a_picture_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write_run(tmp_path / name, [0.5, 0.75])) for name in "ab"]
    output = tmp_path / "new" / "both.png"
    assert main(["plot", *paths, "--output", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output)] and output.read_bytes().startswith(PNG)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.yaml", "summary.csv", "steps.csv"}


def test_each_run_is_in_each_panel(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a", [0.5, 0.75, 0.25]), write_run(tmp_path / "b", [0.25], clip_grad=5.0)]
    loss, metric, norm, rate = draw_overlay(read_curves(paths)).axes
    assert drawn(loss)[0] == [1, 1, 0.5, 0.5, 1 / 3, 1 / 3] and drawn(loss)[2] == [1, 1]
    assert drawn(metric) == [[0.5, 0.75, 0.25], [0.75], [0.25], [0.25]]
    assert drawn(norm) == [[4.0] * 6, [4.0] * 2, [1.0] * 2, [5.0] * 2] and norm.get_yscale() == "log"
    assert drawn(rate) == [[0.01] * 6, [0.01] * 2]
    assert {line.get_color() for axes in (loss, metric, norm, rate) for line in axes.lines} == {"#0072b2", "#d55e00"}


def test_one_limit_is_one_line(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, [0.5]) for name in "abc"]
    assert drawn(draw_overlay(read_curves(paths)).axes[2])[3:] == [[1.0, 1.0]]
    paths = [write_run(tmp_path / name, [0.5], clip_grad=0.0) for name in "de"]
    assert len(drawn(draw_overlay(read_curves(paths)).axes[2])) == 2


def test_a_summary_alone_is_enough(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, [0.5, 0.75]) for name in "ab"]
    (paths[0] / "steps.csv").unlink()
    _, metric, norm, rate = draw_overlay(read_curves(paths)).axes
    assert len(drawn(metric)) == 4 and drawn(norm)[0] == [] and drawn(rate)[1] == [0.01] * 4


def test_a_monitors_record_alone_is_enough(tmp_path: Path) -> None:
    from monitor.test_plot import record

    record(tmp_path / "watched")
    run = write_run(tmp_path / "trained", [0.5])
    loss, _, norm, _ = draw_overlay(read_curves([tmp_path / "watched", run])).axes
    assert len(drawn(norm)[0]) == 40 and math.isnan(drawn(norm)[0][20]) and len(drawn(loss)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none"], "there is no run none"),
        (["a", "empty"], "empty holds neither monitor.jsonl nor steps.csv"),
        (["a", "a", "--output", "picture.jpg"], "give a name that ends in .png"),
        (["a", "damaged"], "damaged/steps.csv is not a table of numbers"),
        (["a", "--output", "a/steps.csv"], "cannot write a/steps.csv: File exists"),
        (["a", "a", "--output", "a/steps.csv/b.png"], "cannot write a/steps.csv: "),
    ],
)
def test_what_cannot_be_drawn_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), [0.5])
    write_run(Path("damaged"), [0.5])
    (tmp_path / "damaged/steps.csv").write_text("epoch,step\n1,x\n")
    (tmp_path / "empty").mkdir()
    assert main(["plot", *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "overlay.png").exists()


def test_labels_tell_runs_apart() -> None:
    assert make_labels([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert make_labels([Path("/x/1/a"), Path("/x/2/a")]) == ["1/a", "2/a"]
    assert make_labels([Path("/x/a"), Path("/x/a")]) == ["x/a", "x/a"]


def test_running_mean() -> None:
    points = [(1, 4.0), (2, 2.0), (3, 0.0), (4, 8.0)]
    assert running_mean(points, 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 4.0)]
    assert running_mean(points, 1) == points


def test_the_report_of_one_run_needs_no_package_of_training() -> None:
    code = "import gradfast.runs.plot, sys; sys.exit('torchvision' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
