"""Torchvision's detectors with a ResNet50 and a feature pyramid, with the changes that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from gradfast.errors import UserError
from gradfast.nn import group_norms, load_pretrained
from gradfast.nn.pretrained import read_weights
from gradfast.train.config import FIELDS, TrainConfig, flag
from gradfast.train.model.weights import find_weights

# Parts of the loss of each, as torchvision calls them.
FASTER_RCNN = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
RETINANET = ("classification", "bbox_regression")
DETECTORS = {
    "fasterrcnn_resnet50_fpn": FASTER_RCNN,
    "fasterrcnn_resnet50_fpn_v2": FASTER_RCNN,
    "retinanet_resnet50_fpn": RETINANET,
    "retinanet_resnet50_fpn_v2": RETINANET,
}
TWO_STAGES = ("proposals", "proposal_batch", "box_batch")  # settings of Faster R-CNN alone

STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
LEVELS = 5  # of the feature pyramid
TOP_N = [(when, mode) for when in ("pre", "post") for mode in ("train", "test")]  # of torchvision's limits on proposals
LONGEST = 5 / 3  # of --img-size: torchvision's 1333 for 800
SMALLEST_IMAGE = 64  # the deepest features of a smaller one are a single pixel, which batch norms cannot measure


def build_detector(config: TrainConfig, classes: int) -> nn.Module:
    """A detector of `classes` classes, drawn from torch's global generator or read from ``--weights``.

    In training it takes images ([3, h, w] float32 in [0, 1] each) and their targets to a dict of losses; in evaluation,
    images to a dict of boxes, labels (1 to K) and scores for each. It resizes images, and boxes with them, by itself:
    the shorter side to ``--img-size``, unless the longer one would become more than `LONGEST` times that.

    Raises:
        UserError: there is no such detector, or the weights do not fit.
    """
    check_detector(config)
    size = config.img_size
    options: dict[str, Any] = {"min_size": size, "max_size": round(LONGEST * size)}
    if DETECTORS[config.model] is FASTER_RCNN:
        options |= {
            "rpn_batch_size_per_image": config.proposal_batch,
            "box_batch_size_per_image": config.box_batch,
            "box_detections_per_img": config.boxes_per_image,
        }
        if config.proposals is not None:
            options |= {f"rpn_{when}_nms_top_n_{mode}": config.proposals for when, mode in TOP_N}
    else:
        options["detections_per_img"] = config.boxes_per_image
    model: Any = torchvision.models.get_model(
        config.model, weights=None, weights_backbone=None, num_classes=classes + 1, **options
    )
    set_anchors(model, config.anchor_size)
    body = model.backbone.body
    if config.zero_init_residual:
        zero_last_norms(body)
    if config.norm == "group":
        group_norms(body)
    if config.weights is not None:
        load_detector(model, find_weights(config.model, config.weights))
    if config.frozen_norm:
        freeze_norms(body)
    assert config.trainable_backbone_layers is not None
    freeze_stages(body, config.trainable_backbone_layers)
    return model


def check_detector(config: TrainConfig) -> None:
    if config.model not in DETECTORS:
        raise UserError(f"--model: there is no detector {config.model!r}; there are {', '.join(DETECTORS)}")
    given = [name for name in TWO_STAGES if getattr(config, name) != FIELDS[name].default]
    if DETECTORS[config.model] is RETINANET and given:
        raise UserError(f"{flag(given[0])}: {config.model} has no second stage that takes proposals; leave it out")
    if config.img_size < SMALLEST_IMAGE:
        raise UserError(f"--img-size {config.img_size} is too small for {config.model}; take {SMALLEST_IMAGE} or more")


def set_anchors(model: Any, smallest: int) -> None:
    """Anchors of three shapes, of `smallest` pixels on the first level and twice as many on each next one.

    RetinaNet has three sizes on each level, a third of an octave apart (Lin et al. 2017).
    """
    ratios = ((0.5, 1.0, 2.0),) * LEVELS
    sides = [smallest * 2**level for level in range(LEVELS)]
    if hasattr(model, "rpn"):
        model.rpn.anchor_generator = AnchorGenerator(tuple((side,) for side in sides), ratios)
    else:
        octave = tuple(tuple(int(side * 2 ** (third / 3)) for third in range(3)) for side in sides)
        model.anchor_generator = AnchorGenerator(octave, ratios)


def zero_last_norms(body: nn.Module) -> None:
    """Start every residual block as the identity, by a zero scale in its last norm (Goyal et al. 2017)."""
    for block in body.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.zeros_(block.bn3.weight if isinstance(block, Bottleneck) else block.bn2.weight)


def load_detector(model: Any, source: str | Mapping[str, Tensor]) -> None:
    """Begin with a detector's weights, or fill the ResNet with those of a classifier.

    Raises:
        UserError: the source holds neither.
    """
    weights = read_weights(source)
    if any(name.startswith("backbone.") for name in weights):
        load_pretrained(model, weights)
    else:
        load_pretrained(model.backbone.body, weights)


def freeze_norms(body: nn.Module) -> None:
    """Put constants in the place of batch norms: y = (x - mean) / sqrt(var + eps) * weight + bias, all as they are."""
    for name, old in [(name, module) for name, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)]:
        new = FrozenBatchNorm2d(old.num_features, eps=old.eps)
        new.load_state_dict({key: value for key, value in old.state_dict().items() if key in new.state_dict()})
        parent, _, own = name.rpartition(".")
        setattr(body.get_submodule(parent), own, new)


def freeze_stages(body: nn.Module, trainable: int) -> None:
    """Let the last `trainable` of the five stages learn; the first convolution counts as one, with its norm."""
    learning = STAGES[:trainable] + (("bn1",) if trainable == len(STAGES) else ())
    for name, parameter in body.named_parameters():
        if not name.startswith(learning):
            parameter.requires_grad_(False)
