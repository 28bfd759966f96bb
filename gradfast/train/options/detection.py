"""What only detectors have."""

from __future__ import annotations

import dataclasses

from gradfast.train import parse
from gradfast.train.options.field import option, switch


@dataclasses.dataclass(frozen=True)
class DetectionOptions:
    """The settings of the group `detection`."""

    trainable_backbone_layers: int | None = option(
        None,
        parse.natural,
        "detection",
        "how many of the ResNet's five stages learn, counted from the last; the others stay as --weights has them "
        "(default: 3 with --weights, else all 5)",
        "N",
    )
    frozen_norm: bool | None = switch(
        "detection",
        "keep scale, shift and statistics of the ResNet's batch norms as --weights has them: batches of a few images "
        "measure them badly (default: with --weights and --norm batch; from random weights they must learn)",
        default=None,
    )
    anchor_size: int = option(
        32,
        parse.positive_int,
        "detection",
        "side of the smallest anchors, in pixels of --img-size; each level of the pyramid doubles it",
        "PIXELS",
    )
    proposals: int | None = option(
        None,
        parse.positive_int,
        "detection",
        "Faster R-CNN: boxes that the first stage passes on, of an image (default: 2000 in training, 1000 after)",
        "N",
    )
    proposal_batch: int = option(
        256, parse.positive_int, "detection", "Faster R-CNN: anchors of an image that the first stage learns from", "N"
    )
    box_batch: int = option(
        512, parse.positive_int, "detection", "Faster R-CNN: boxes of an image that the second stage learns from", "N"
    )
    boxes_per_image: int = option(100, parse.positive_int, "detection", "boxes found in an image, at most", "N")
