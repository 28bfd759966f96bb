"""What the trainer would skip of a data set, and what is left: every file decoded, every box looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gradfast.train.coco.dataset import read_scene
from gradfast.train.coco.layout import list_coco, looks_like_coco
from gradfast.train.coco.listing import Scene
from gradfast.train.data.folder import list_folder
from gradfast.train.data.images import BadImage
from gradfast.train.data.reading import Track, read_every


@dataclass
class Report:
    """What a check found.

    Attributes:
        kind: "images in folders of classes" or "COCO annotations".
        parts: of each part, its name, its images that can be used, and how many of what each class has.
        bad: what the trainer would skip.
    """

    kind: str
    parts: list[tuple[str, int, dict[str, int]]] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)

    def lines(self, most: int | None = None) -> Iterator[str]:
        """The report as text: totals, then what would be skipped, `most` of it at most."""
        yield self.kind
        for name, images, counts in self.parts:
            yield f"  {name}: {images} images; {', '.join(f'{count} {what}' for what, count in counts.items())}"
        yield f"{len(self.bad)} would be skipped by gradfast train" + (", and refused by --strict:" if self.bad else "")
        for bad in self.bad[:most]:
            yield f"  {bad.path}: {bad.reason}"
        if most is not None and len(self.bad) > most:
            yield f"  and {len(self.bad) - most} more; --all lists them"


def check_data(root: Path, track: Track = lambda items, total: items) -> Report:
    """Check a folder: COCO data where it has annotations, else folders of classes.

    Args:
        track: passes on the images as they are checked; is told their number.

    Raises:
        UserError: nothing in the folder could be trained on at all.
    """
    return check_coco(root, track) if looks_like_coco(root) else check_folder(root, track)


def check_folder(root: Path, track: Track) -> Report:
    train, held_out, bad = list_folder(root)
    report = Report("images in folders of classes", bad=list(bad))
    for name, part in name_parts(train, held_out):
        sound = sound_images(part, part.read, report, track)
        report.parts.append((name, len(sound), counts_of(sound)))
    return report


def check_coco(root: Path, track: Track) -> Report:
    train, held_out, bad = list_coco(root)
    report = Report("COCO annotations", bad=list(bad))
    for name, part in name_parts(train, held_out):
        sound = sound_images(part, partial(read_number, part.scenes), report, track)
        crowds = sum(len(scene.crowds) for scene in sound.scenes)
        others = {"crowds": crowds, "images without a box": sound.empty_scenes()}
        report.parts.append((name, len(sound), counts_of(sound) | {what: n for what, n in others.items() if n}))
    return report


def read_number(scenes: Sequence[Scene], index: int) -> Tensor | BadImage:
    return read_scene(scenes[index])


def sound_images(part: Any, read: Callable[[int], Any], report: Report, track: Track) -> Any:
    """The images of a listing that can be decoded; the others go to the report."""

    def problem(index: int) -> BadImage | None:
        image = read(index)
        return image if isinstance(image, BadImage) else None  # a sound one need not be kept

    sound, _, bad = read_every(part, problem, track)
    report.bad += bad
    return sound


def counts_of(part: Any) -> dict[str, int]:
    return dict(zip(part.classes, part.counts(), strict=True))


def name_parts(train: Any, held_out: Any) -> list[tuple[str, Any]]:
    return [("all", train)] if held_out is None else [("train", train), ("val", held_out)]
