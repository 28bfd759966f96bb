"""One annotations file in COCO's format, checked whole before any image is opened.

What spoils the file as a whole (it cannot be read, it is no such file, its categories contradict each other) is an
error. What spoils one image or one box is named, left out and counted; ``--strict`` refuses the data instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradfast.errors import UserError
from gradfast.train.coco.categories import Categories
from gradfast.train.coco.check import check_box, object_area, shorten, whole_number
from gradfast.train.coco.listing import Box, Crowd, Scene, SceneListing
from gradfast.train.data.images import BadImage


@dataclass
class Draft:
    """A scene while its annotations are gathered."""

    path: Path
    name: str
    width: int
    height: int
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)


def read_annotations(path: Path, folders: Sequence[Path]) -> tuple[SceneListing, list[BadImage]]:
    """Read an annotations file.

    Args:
        path: the JSON file.
        folders: where its images may be, tried in this order for each.

    Returns:
        (scenes in the order of their ids, what was left out). Images without a box are scenes, too.

    Raises:
        UserError: the file cannot be read, is not COCO's format, or holds no image that is there.
    """
    content = read_json(path)
    categories = read_categories(content["categories"], path)
    drafts, unusable, bad = read_images(content["images"], path, folders)
    seen: set[int] = set()
    for position, annotation in enumerate(content["annotations"]):
        problem = add_annotation(annotation, drafts, unusable, categories, seen)
        if problem:
            bad.append(BadImage(f"{path}, {name_annotation(annotation, position, drafts)}", problem))
    if not drafts:
        first = f"; the first: {bad[0].path}: {bad[0].reason}" if bad else ""
        raise UserError(f"{path} names no image that can be used{first}")
    scenes = tuple(
        Scene(d.path, number, d.width, d.height, tuple(d.boxes), tuple(d.labels), tuple(d.areas), tuple(d.crowds))
        for number, d in sorted(drafts.items())
    )
    return SceneListing(scenes, categories), bad


def read_json(path: Path) -> dict[str, list[Any]]:
    """The three lists of an annotations file, `images`, `annotations` and `categories`."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is not JSON ({error}); is it complete?") from None
    except RecursionError:
        raise UserError(f"{path} is not COCO's format: it is nested too deep") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not COCO's format: expected an object with images, annotations and categories")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            held = "is no list" if name in content else "is missing"
            raise UserError(f"{path} is not COCO's format: {name!r} {held}")
    return content


def read_categories(entries: Sequence[Any], path: Path) -> Categories:
    """Categories in the order of their ids, whatever gaps these have.

    Raises:
        UserError: there are none, or one has no id or name, or an id or name occurs twice.
    """
    names: dict[int, str] = {}
    for entry in entries:
        number = whole_number(entry.get("id")) if isinstance(entry, Mapping) else None
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if number is None or not isinstance(name, str) or not name:
            raise UserError(f"{path}: category {shorten(entry)} needs a whole number as id and a name")
        if number in names:
            raise UserError(f"{path}: categories {names[number]!r} and {name!r} have the same id, {number}")
        if name in names.values():
            raise UserError(f"{path}: two categories are called {name!r}; rename one")
        names[number] = name
    if not names:
        raise UserError(f"{path} lists no categories, so that there is nothing to detect")
    ids = sorted(names)
    return Categories(tuple(names[number] for number in ids), tuple(ids))


def read_images(
    entries: Sequence[Any], path: Path, folders: Sequence[Path]
) -> tuple[dict[int, Draft], set[int], list[BadImage]]:
    """(usable images by id, ids of the others, what is wrong with those)."""
    drafts: dict[int, Draft] = {}
    unusable: set[int] = set()
    bad: list[BadImage] = []
    for position, entry in enumerate(entries):
        number = whole_number(entry.get("id")) if isinstance(entry, Mapping) else None
        if number is None:
            bad.append(BadImage(f"{path}, image {position + 1} of the list", "it has no whole number as id"))
            continue
        draft = read_image_entry(entry, folders)
        if number in drafts:
            draft = f"its id is that of {drafts[number].name}, too"
        elif isinstance(draft, str):
            unusable.add(number)
        if isinstance(draft, str):
            bad.append(BadImage(f"{path}, image {number} ({shorten(entry.get('file_name'))})", draft))
        else:
            drafts[number] = draft
    return drafts, unusable - set(drafts), bad


def read_image_entry(entry: Mapping[str, Any], folders: Sequence[Path]) -> Draft | str:
    name, width, height = entry.get("file_name"), whole_number(entry.get("width")), whole_number(entry.get("height"))
    if not isinstance(name, str) or not name or "\0" in name:
        return "it has no file_name"
    if width is None or height is None or width < 1 or height < 1:
        size = f"{shorten(entry.get('width'))} x {shorten(entry.get('height'))}"
        return f"its size, {size}, is not that of an image"
    for folder in folders:
        if (folder / name).is_file():
            return Draft(folder / name, name, width, height)
    return f"there is no such file in {' or '.join(str(folder) for folder in folders)}"


def add_annotation(
    annotation: Any, drafts: Mapping[int, Draft], unusable: set[int], categories: Categories, seen: set[int]
) -> str | None:
    """Put an annotation into its image's draft; or say why it cannot be used.

    Nothing is said of an annotation whose image cannot be used: the image was named already.
    """
    if not isinstance(annotation, Mapping):
        return f"it is no object but {shorten(annotation)}"
    image_id = whole_number(annotation.get("image_id"))
    if image_id in unusable:
        return None
    draft = drafts.get(image_id) if image_id is not None else None
    if draft is None:
        return f"there is no image with the id {shorten(annotation.get('image_id'))}"
    number = whole_number(annotation.get("id"))
    if number is not None and number in seen:
        return f"another annotation before it has the id {number}"
    category = whole_number(annotation.get("category_id"))
    label = categories.label(category) if category is not None else None
    if label is None:
        return f"there is no category with the id {shorten(annotation.get('category_id'))}"
    box = check_box(annotation.get("bbox"), draft.width, draft.height)
    if isinstance(box, str):
        return box
    if number is not None:
        seen.add(number)
    left, top, width, height = (float(edge) for edge in annotation["bbox"])
    area = object_area(annotation, box, uncut=box == Box(left, top, left + width, top + height))
    if annotation.get("iscrowd"):
        draft.crowds.append(Crowd(label, (left, top, width, height), area))
    else:
        draft.boxes.append(box)
        draft.labels.append(label)
        draft.areas.append(area)
    return None


def name_annotation(annotation: Any, position: int, drafts: Mapping[int, Draft]) -> str:
    """Its id, or place in the list where it has none, and its image's name."""
    if not isinstance(annotation, Mapping):
        return f"annotation {position + 1} of the list"
    number = annotation.get("id")
    name = f"annotation {shorten(number)}" if number is not None else f"annotation {position + 1} of the list"
    image_id = whole_number(annotation.get("image_id"))
    draft = drafts.get(image_id) if image_id is not None else None
    return f"{name} of {draft.name}" if draft else name
