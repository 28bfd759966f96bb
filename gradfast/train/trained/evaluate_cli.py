"""``gradfast eval``: a checkpoint's figures, measured anew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.files import atomic_write
from gradfast.train.settings import check_value

if TYPE_CHECKING:
    from gradfast.train.trained.evaluate import Measured
    from gradfast.train.trained.load import Trained

CLASSES_SHOWN = 50  # in the table; beyond that those with the lowest figures

DESCRIPTION = """\
Measure a trained model on the images that its run held out, with the run's own split, image size and precision: the
figures are those of summary.csv for that epoch. Or measure it on other images of the same classes.

  gradfast eval resnet50-elpv-1                      the best checkpoint of a run (of runs/, or give its folder)
  gradfast eval runs/resnet50-elpv-1/last.pt         a certain checkpoint
  gradfast eval RUN --data photos/new                all images of another data set, of the same form and classes
  gradfast eval RUN --split all                      training images too: how much of them was learnt by heart?
  gradfast eval RUN --confusion confusion.png --confusion confusion.csv --json figures.json

A classifier's figures: loss, accuracy, balanced accuracy (the mean of the classes' recalls), and each class's
precision, recall and F1. A detector's: COCO's twelve, and AP of each class. Of a run with --model-ema it is the average
that is measured."""

TITLES = {"eval_acc1": "accuracy", "eval_balanced_acc": "balanced accuracy"}


def build_parser() -> CommandParser:
    parser = CommandParser(prog="gradfast eval", description=DESCRIPTION)
    parser.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint), or a checkpoint")
    parser.add_argument("--data", metavar="PATH|NAME", help="measure on these images (default: the run's own)")
    parser.add_argument(
        "--split",
        metavar="val|all",
        help="the held-out images, or all (default: val of the run's own data, all of --data)",
    )
    parser.add_argument("--batch-size", metavar="N", help="images per forward pass (default: the run's)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--amp", metavar="off|bf16|fp16", help="precision of the forward pass (default: the run's)")
    parser.add_argument("--workers", metavar="N", help="processes that read images (default: decided from the data)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - for standard output, alone")
    parser.add_argument(
        "--confusion",
        metavar="FILE",
        action="append",
        default=[],
        help="write a classifier's confusion matrix there: a picture if the name ends in .png, a table if in .csv",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast eval``; returns the exit code."""
    options = build_parser().parse_args(arguments)
    changes = read_changes(options)
    pictures = [Path(name) for name in options.confusion]
    for path in pictures:
        if path.suffix.lower() not in (".png", ".csv"):
            raise UserError(f"--confusion {path}: give a name that ends in .png or .csv")
    for package in ("numpy", "PIL", "torchvision"):
        require(package, "train", "gradfast eval")
    from gradfast.train.trained.evaluate import SPLITS, evaluation_config, measure
    from gradfast.train.trained.load import find_checkpoint, read_trained
    from gradfast.train.trained.watching import note, watched

    split = options.split or ("all" if options.data else "val")
    if split not in SPLITS:
        raise UserError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}")
    trained = read_trained(find_checkpoint(options.checkpoint))
    if pictures and trained.config.task != "classify":
        raise UserError(f"--confusion: {trained.path} is a detector, and only a classifier confuses classes")
    config = evaluation_config(trained, changes)
    note(trained.describe())
    measured = measure(trained, config, split, note, lambda items, total: watched(items, total, "measuring"))
    if options.data is None and not measured.same_data:
        note(
            f"warning: the images of {config.data}, or their split, are not those the model was trained with: it may "
            "have learnt from some of the held-out ones"
        )
    for bad in measured.bad:
        note(f"skipped {bad.path}: {bad.reason}")
    if options.json != "-":
        print(describe(measured, split, config.data))
    if options.json:
        write_json(options.json, to_dict(trained, measured, split, config.data))
    for path in pictures:
        write_confusion(path, trained, measured)
    return 0


def read_changes(options: Any) -> dict[str, Any]:
    """The settings of the run that the flags change, checked as ``gradfast train`` checks them."""
    changes: dict[str, Any] = {"device": "auto"}
    for name in ("data", "batch_size", "device", "amp", "workers"):
        value = getattr(options, name)
        if value is not None:
            changes[name] = check_value(name, value, "--" + name.replace("_", "-"))
    return changes


def describe(measured: Measured, split: str, data: str) -> str:
    """The figures as text."""
    which = "held-out" if split == "val" else "training and held-out"
    lines = [f"{measured.images} {which} images of {data}"]
    titles = {name: TITLES.get(name, name.removeprefix("eval_")) for name in measured.values}
    width = max(map(len, titles.values())) + 2
    lines += [f"{titles[name]:<{width}}{_figure(value)}" for name, value in measured.values.items()]
    return "\n".join([*lines, "", *class_table(measured.per_class)])


def class_table(per_class: dict[str, dict[str, float]]) -> list[str]:
    """A line per class; of very many the lowest by the last column, which sums it up."""
    columns = list(next(iter(per_class.values())))
    names = list(per_class)
    rest = ""
    if len(names) > CLASSES_SHOWN:
        key = columns[-1]
        names.sort(key=lambda name: (per_class[name][key] != per_class[name][key], per_class[name][key]))
        rest = f"... the {CLASSES_SHOWN} of {len(per_class)} classes with the lowest {key}; --json FILE has all"
        names = names[:CLASSES_SHOWN]
    width = max(len("class"), *map(len, names))
    lines = ["class".ljust(width) + "".join(f"{column:>11}" for column in columns)]
    lines += [
        name.ljust(width) + "".join(f"{_figure(per_class[name][column]):>11}" for column in columns) for name in names
    ]
    return [*lines, rest] if rest else lines


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def to_dict(trained: Trained, measured: Measured, split: str, data: str) -> dict[str, Any]:
    """All figures for ``--json``: numbers that are not finite are null."""
    return {
        "checkpoint": str(trained.path),
        "epoch": trained.epoch,
        "task": trained.config.task,
        "model": trained.config.model,
        "averaged": trained.averaged,
        "data": data,
        "split": split,
        "same_data": measured.same_data,
        "images": measured.images,
        "skipped": [{"file": bad.path, "reason": bad.reason} for bad in measured.bad],
        "values": _finite(measured.values),
        "per_class": {name: _finite(row) for name, row in measured.per_class.items()},
        "classes": list(trained.classes),
        "confusion": None if measured.confusion is None else measured.confusion.tolist(),
    }


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def write_json(target: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    if target == "-":
        print(text)
        return
    with atomic_write(Path(target)) as file:
        file.write(text.encode() + b"\n")


def write_confusion(path: Path, trained: Trained, measured: Measured) -> None:
    from gradfast.train.trained.class_scores import confusion_csv, confusion_png

    assert measured.confusion is not None
    if path.suffix.lower() == ".csv":
        content = confusion_csv(measured.confusion, trained.classes).encode()
    else:
        accuracy = measured.values["eval_acc1"]
        content = confusion_png(measured.confusion, trained.classes, f"{trained.config.model}: accuracy {accuracy:.3f}")
    with atomic_write(path) as file:
        file.write(content)
