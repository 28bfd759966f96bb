"""The classes of a detection data set, under the file's numbers and under the model's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Categories:
    """Classes with the ids of the annotations file, such as COCO's 1 to 90 with gaps, and the model's 1 to K.

    Label 0 is the background in torchvision's detectors, so that ``names[i]`` has label i + 1.

    Attributes:
        names: one per class, in the order of their ids.
        ids: the file's id of each.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _labels(self) -> dict[int, int]:
        return {category: label for label, category in enumerate(self.ids, start=1)}

    def label(self, category_id: int) -> int | None:
        """The label, 1 to K, of a category id; None where there is no such category."""
        return self._labels.get(category_id)

    def category_id(self, label: int) -> int:
        """The category id of a label, 1 to K.

        Raises:
            IndexError: the label is the background's, or beyond K.
        """
        if not 1 <= label <= len(self.ids):
            raise IndexError(f"label {label} is none of 1 to {len(self.ids)}")
        return self.ids[label - 1]
