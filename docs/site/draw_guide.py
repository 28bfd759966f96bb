"""The pictures of docs/training.md, from the very commands that it shows.

    python docs/site/draw_guide.py                   all of them: some minutes on one CPU core
    python docs/site/draw_guide.py rate clipping     these

Each picture is of two runs or three, as `FIGURES` says: the training loss of every step and the gradient's norm before
clipping, or the losses and the accuracy of every epoch. A run that is in runs/guide already is not made again. The
photographs are those of ``elpv-dataset``.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
RUNS = Path("runs/guide")
BASE = "gradfast train --model resnet18 --img-size 32"
SMOOTHING = 0.9  # of the loss: what the running mean keeps at each step
# Orange, blue and green of the Okabe-Ito palette, each with a stroke of its own.
STYLES = [("#d55e00", "--"), ("#0072b2", "-"), ("#009e73", "-.")]


@dataclass(frozen=True)
class Run:
    """A run of a picture: what the legend calls it, and its command."""

    label: str
    command: str


@dataclass(frozen=True)
class Figure:
    """A picture: its title, and its runs, the broken one first; of every step, or of every epoch's held-out images."""

    title: str
    runs: tuple[Run, ...]
    by_epoch: bool = False


def small_run(label: str, flags: str) -> Run:
    """A run of the guide's model, with these flags."""
    return Run(label, f"{BASE} {flags}")


LONG = "--epochs 20 --val-split 0.75"
SHORT = "--epochs 1 --sched constant --warmup-epochs 0"
AS_TORCH = "--clip-grad off --nonfinite propagate --on-spike none"
NO_NORMS = "--norm none --init kaiming"

EXPLODES = small_run("no norms, rate 0.05, no limit", f"{SHORT} {NO_NORMS} --lr 0.05 {AS_TORCH}")
SOUND = small_run("batch norms, rate 0.02", f"{SHORT} --lr 0.02 {AS_TORCH}")

FIGURES = {
    "explosion": Figure("An explosion, and a sound run", (EXPLODES, SOUND)),
    "initialisation": Figure(
        "No norms, rate 0.02: three ways to draw the weights",
        (
            small_run("gpt2: std 0.02", f"{SHORT} --norm none --init gpt2 --lr 0.02"),
            small_run("kaiming", f"{SHORT} {NO_NORMS} --lr 0.02"),
            small_run("fixup", f"{SHORT} --norm none --init fixup --lr 0.02"),
        ),
    ),
    "activation": Figure(
        "No norms, rate 0.02: sigmoid, and relu",
        (
            small_run("sigmoid", f"{SHORT} {NO_NORMS} --activation sigmoid --lr 0.02"),
            small_run("relu", f"{SHORT} {NO_NORMS} --lr 0.02"),
        ),
    ),
    "rate": Figure(
        "Batch norms, no limit: a rate of 1, and of 0.02",
        (small_run("rate 1", f"{SHORT} --lr 1 {AS_TORCH}"), SOUND),
    ),
    "clipping": Figure(
        "No norms, rate 0.05: without a limit, and with one",
        (EXPLODES, small_run("--clip-grad 1", f"{SHORT} {NO_NORMS} --lr 0.05 --clip-grad 1")),
    ),
    "guards": Figure(
        "Batch norms, no limit, a rate of 1: as torch does, and with a rate that draws back",
        (
            small_run("as torch does", f"{SHORT} --lr 1 {AS_TORCH}"),
            small_run("--on-spike backoff", f"{SHORT} --lr 1 --clip-grad off --on-spike backoff"),
        ),
    ),
    "regularisation": Figure(
        "A quarter of the photographs, twenty epochs: learnt by heart, and regularised",
        (
            small_run("plain", f"{LONG} --augment none --weight-decay 0"),
            small_run("decay, dropout, augmentation", f"{LONG} --weight-decay 0.002 --dropout 0.3"),
        ),
        by_epoch=True,
    ),
}


def folder_of(run: Run) -> Path:
    """Where a command's run is kept: the command itself is in its name, so that a changed one is run anew."""
    words = [word.strip("-") for word in shlex.split(run.command)[2:]]
    return RUNS / "_".join(words)


def make(run: Run) -> Path:
    """Run a command, unless it has been; returns its folder."""
    folder = folder_of(run)
    if not (folder / "curves.png").exists():  # drawn after an epoch
        shutil.rmtree(folder, ignore_errors=True)
        arguments = shlex.split(run.command)[1:]
        print(run.command, flush=True)
        command = [sys.executable, "-m", "gradfast", *arguments, "--output", str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if not (folder / "curves.png").exists():
            raise SystemExit(f"{run.command}: exit code {done.returncode}, and no curves.png")
    return folder


def read(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean, free of its start at zero; nan from the first value on that is not finite."""
    mean, smoothed = 0.0, []
    for number, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smoothed.append(mean / (1 - SMOOTHING**number))
    return smoothed


def draw(figure: Figure, path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, 3), layout="constrained", dpi=80)
    left, right = canvas.subplots(1, 2)
    (draw_epochs if figure.by_epoch else draw_steps)(figure, left, right)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(fontsize=7 if figure.by_epoch else 8, loc="lower left" if figure.by_epoch else "best")
    canvas.suptitle(figure.title)
    canvas.savefig(path, metadata={"Software": None})


def draw_steps(figure: Figure, left: Any, right: Any) -> None:
    """The training loss, and the gradient's norm before clipping."""
    for run, (colour, stroke) in zip(figure.runs, STYLES):
        folder = make(run)
        rows = read(folder / "steps.csv")
        steps = [row["step"] for row in rows]
        draw_line(left, steps, smooth([row["loss"] for row in rows]), run.label, colour, stroke)
        draw_line(right, steps, [row["grad_norm"] for row in rows], run.label, colour, stroke)
    left.set(title="training loss", xlabel="step")
    right.set(title="gradient norm before clipping", xlabel="step", yscale="log")
    if left.get_ylim()[1] > 100:
        left.set(yscale="log")


def draw_epochs(figure: Figure, left: Any, right: Any) -> None:
    """The losses on training and held-out images, and the balanced accuracy on the latter."""
    for run, (colour, stroke) in zip(figure.runs, STYLES):
        rows = read(make(run) / "summary.csv")
        epochs = [row["epoch"] for row in rows]
        left.plot(
            epochs, [row["train_loss"] for row in rows], color=colour, linestyle=":", label=f"{run.label}: training"
        )
        left.plot(
            epochs, [row["eval_loss"] for row in rows], color=colour, linestyle=stroke, label=f"{run.label}: held out"
        )
        right.plot(epochs, [row["eval_balanced_acc"] for row in rows], color=colour, linestyle=stroke)
    left.set(title="loss", xlabel="epoch")
    right.set(title="balanced accuracy on held-out images", xlabel="epoch")


def draw_line(axes: Any, steps: Sequence[float], values: Sequence[float], label: str, colour: str, stroke: str) -> None:
    """A curve, with a cross at its last finite value where it ends before the run does."""
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    axes.plot(*zip(*finite, strict=True), color=colour, linestyle=stroke, label=label, linewidth=1.2)
    if len(finite) < len(steps):
        axes.plot(*finite[-1], marker="X", color=colour, markersize=9)


def report(figure: Figure) -> list[dict[str, Any]]:
    """The numbers of a picture's runs, for the text beside it."""
    numbers = []
    for run in figure.runs:
        steps, summary = read(make(run) / "steps.csv"), read(make(run) / "summary.csv")
        norms = [row["grad_norm"] for row in steps]
        last = summary[-1] if summary else {}
        numbers.append(
            {
                "label": run.label,
                "steps": len(steps),
                "first_norm": norms[0],
                "largest_norm": max(norms),
                "first_bad": next((int(row["step"]) for row in steps if not math.isfinite(row["grad_norm"])), None),
                "last_loss": smooth([row["loss"] for row in steps])[-1],
                **{name: last.get(name) for name in ("train_loss", "eval_loss", "eval_balanced_acc")},
            }
        )
    return numbers


def main(names: Sequence[str]) -> None:
    for name in names or FIGURES:
        draw(FIGURES[name], IMAGES / f"guide-{name}.png")
        print(name, json.dumps(report(FIGURES[name]), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
