"""Photographs of solar cells: the PyPI package ``elpv-dataset``, read where it is installed and never copied.

2,624 electroluminescence images, 300 x 300 pixels, 8-bit grey, each with the probability (0, 1/3, 2/3, 1) that the
cell is defective, and its kind (mono- or polycrystalline). Used here: the 1,508 that are surely functional (0) against
the 715 that are surely defective (1); the experts' maybes are left out.

The cells were cut from 44 modules that the labels do not name, so that a random split puts cells of one module on
both sides: expect somewhat lower figures on modules never seen.

Source: Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence
images", Solar Energy 185 (2019); Buerhop-Lutz et al., EU PVSEC 2018. Images: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gradfast.errors import UserError
from gradfast.train.data.listing import Listing

CLASSES = ("functional", "defective")


def list_elpv() -> Listing:
    """Functional and defective cells; strata are (class, kind of cell).

    Raises:
        UserError: the package is not installed, or not as it should be.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "--data elpv needs the package elpv-dataset, which is not installed: pip install 'gradfast[demo]' "
            "(or give --data the path of an image folder)"
        )
    return read_labels(Path(next(iter(package.submodule_search_locations))) / "data" / "labels.csv")


def read_labels(path: Path) -> Listing:
    """Read ``labels.csv``: white-space columns path, probability, kind; paths relative to the file.

    Raises:
        UserError: the file is missing, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--data elpv: cannot read {path}: {error.strerror}; reinstall elpv-dataset") from None
    paths: list[Path] = []
    targets: list[int] = []
    kinds: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            name, probability, kind = line.split()
            certainty = float(probability)
        except ValueError:
            raise UserError(f"--data elpv: {path}, line {number} is not 'path probability kind'") from None
        if certainty in (0.0, 1.0):
            paths.append(path.parent / name)
            targets.append(int(certainty))
            kinds.append(kind)
    strata = tuple((CLASSES[target], kind) for target, kind in zip(targets, kinds, strict=True))
    listing = Listing(tuple(paths), tuple(targets), CLASSES, strata)
    listing.require_every_class(str(path))
    return listing
