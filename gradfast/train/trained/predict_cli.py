"""``gradfast predict``: classes of images, or boxes in them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import require
from gradfast.files import atomic_write, make_folder
from gradfast.train import parse

if TYPE_CHECKING:
    from gradfast.train.trained.load import Trained
    from gradfast.train.trained.predict import Prediction
    from gradfast.train.trained.predict_output import Format

EXIT_BAD_IMAGES = 1

DESCRIPTION = """\
Let a trained model look at images: files, or folders with images at any depth. Preprocessing is that of evaluation.

  gradfast predict resnet50-elpv-1 cell.png             the most probable class of an image
  gradfast predict RUN photos/ --top 3 --output p.csv   the three most probable classes of many
  gradfast predict RUN photos/ --output p.jsonl         an object per image and line
  gradfast predict DETECTOR photos/ --pictures seen/    boxes, and pictures of them
  gradfast predict DETECTOR photos/ --output p.json     COCO's format of results

A classifier's CSV has the columns file, rank, class, probability; a detector's file, class, score, x, y, width, height
(left and top edge, in pixels). Without --output, CSV goes to standard output, and nothing else does. Images that cannot
be read are named and passed over; the exit code is then 1."""


def build_parser() -> CommandParser:
    parser = CommandParser(prog="gradfast predict", description=DESCRIPTION)
    parser.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint), or a checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    parser.add_argument("--top", metavar="K", default="1", help="classes of each image (default: 1)")
    parser.add_argument("--score", metavar="S", default="0.5", help="leave out boxes of lower scores (default: 0.5)")
    parser.add_argument("--output", metavar="FILE", help="write there: .csv, .jsonl, or (boxes) .json in COCO's format")
    parser.add_argument("--pictures", metavar="FOLDER", help="draw each image with its boxes there, as PNG")
    parser.add_argument(
        "--annotations", metavar="FILE.json", help="take the ids of images and categories for .json from this file"
    )
    parser.add_argument("--batch-size", metavar="N", help="images per forward pass (default: 32; of a detector 4)")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="cpu, cuda ... (default: a GPU if any)")
    parser.add_argument("--amp", metavar="off|bf16|fp16", help="precision of the forward pass (default: the run's)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast predict``; returns the exit code: 1 where an image could not be read."""
    options = build_parser().parse_args(arguments)
    top = checked("--top", parse.positive_int, options.top)
    score = checked("--score", parse.share, options.score)
    for package in ("numpy", "PIL", "torchvision"):
        require(package, "train", "gradfast predict")
    from gradfast.train.data.images import BadImage
    from gradfast.train.machine.place import AMP_TYPES, Place, choose_device
    from gradfast.train.trained.load import find_checkpoint, read_trained
    from gradfast.train.trained.predict import find_images, predict
    from gradfast.train.trained.watching import note, watched

    trained = read_trained(find_checkpoint(options.checkpoint))
    detects = trained.config.task == "detect"
    size = checked("--batch-size", parse.positive_int, options.batch_size or ("4" if detects else "32"))
    amp = checked("--amp", parse.one_of(*AMP_TYPES), options.amp or trained.config.amp)
    place = Place.of(choose_device(options.device), amp, trained.config.channels_last)
    output = choose_format(trained, options, top, score)
    pictures = Pictures(Path(options.pictures), trained.classes, score) if options.pictures else None
    paths = find_images(options.images)
    bad = 0
    batches = watched(predict(trained, place, paths, size), -(-len(paths) // size), "predicting")
    with opened(options.output) as write:
        write(output.begin())
        for batch in batches:
            for one in batch:
                if isinstance(one, BadImage):
                    bad += 1
                    note(f"skipped {one.path}: {one.reason}")
                    continue
                write(output.one(one))
                if pictures is not None:
                    pictures.draw(one)
        write(output.end())
    if bad:
        note(f"{bad} of {len(paths)} images could not be read")
    return EXIT_BAD_IMAGES if bad else 0


def checked(flag: str, parse_value: Callable[[str], Any], text: str) -> Any:
    try:
        return parse_value(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def choose_format(trained: Trained, options: Any, top: int, score: float) -> Format:
    """How predictions are written, by the task and the name of ``--output``.

    Raises:
        UserError: the task has no such format, or no use for a flag.
    """
    from gradfast.train.trained.predict_output import BoxLines, ClassLines, CocoResults, read_ids

    detects = trained.config.task == "detect"
    kind = Path(options.output).suffix.lower().removeprefix(".") if options.output else "csv"
    kinds = ("csv", "jsonl", "json") if detects else ("csv", "jsonl")
    if kind not in kinds:
        raise UserError(f"--output {options.output}: give a name that ends in {' or '.join('.' + k for k in kinds)}")
    if options.pictures and not detects:
        raise UserError(f"--pictures draws boxes, and {trained.path} is a classifier")
    if options.annotations and kind != "json":
        raise UserError("--annotations gives the ids for --output FILE.json of a detector; leave it out")
    if not detects:
        return ClassLines(trained.classes, top, kind)
    if kind != "json":
        return BoxLines(trained.classes, score, kind)
    ids = read_ids(Path(options.annotations), trained.classes) if options.annotations else (None, None)
    return CocoResults(trained.classes, score, *ids)


@contextlib.contextmanager
def opened(output: str | None) -> Iterator[Callable[[str], object]]:
    """What text is written with: to a file that is whole or not there, or to standard output."""
    if output is None:
        yield sys.stdout.write
        sys.stdout.flush()
        return
    with atomic_write(Path(output)) as file:
        yield lambda text: file.write(text.encode())


class Pictures:
    """Each image with its boxes, in a file of its name; a second image of a name gets its number too."""

    def __init__(self, folder: Path, classes: Sequence[str], score: float) -> None:
        self.folder = folder
        self.classes = classes
        self.score = score
        self._taken: set[str] = set()
        make_folder(folder)

    def draw(self, prediction: Prediction) -> None:
        from gradfast.train.coco.pictures import draw_predictions

        name = prediction.path.stem
        if name in self._taken:
            name = f"{name}-{prediction.number}"
        self._taken.add(name)
        found = {"boxes": prediction.boxes, "labels": prediction.labels, "scores": prediction.scores}
        path = self.folder / f"{name}.png"
        draw_predictions(path, [prediction.pixels], [{}], [found], self.classes, self.score)
