"""What a data set is before any image is read: paths, targets, class names, and strata for a fair split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradfast.errors import UserError


@dataclass(frozen=True)
class Listing:
    """Images and their classes.

    Attributes:
        paths: one per image.
        targets: index into `classes`, one per image.
        classes: class names, in the order of the model's outputs.
        strata: anything sortable and hashable, one per image; a split keeps the proportions of these.
    """

    paths: tuple[Path, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]
    strata: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Sequence[int]) -> Listing:
        return Listing(
            tuple(self.paths[i] for i in indices),
            tuple(self.targets[i] for i in indices),
            self.classes,
            tuple(self.strata[i] for i in indices),
        )

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        counts = [0] * len(self.classes)
        for target in self.targets:
            counts[target] += 1
        return counts

    def require_every_class(self, where: str) -> None:
        """Raises:
        UserError: a class has no image in this listing.
        """
        for name, count in zip(self.classes, self.counts(), strict=True):
            if count == 0:
                raise UserError(f"class {name!r} has no image in {where}; add images or remove the class")

    def fingerprint(self) -> str:
        """A digest of file names, targets and classes, by which a resumed run knows that its data is the same."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for path, target in zip(self.paths, self.targets, strict=True):
            digest.update(f"\0{path.parent.name}/{path.name}\0{target}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
