"""--freeze-backbone: nothing but the classifier moves while it holds, and everything afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=Exception)

import torch
import torchvision
from torch import Tensor
from train.cases import arguments, untimed

from gradfast.cli import main
from gradfast.train.model.freeze import FrozenBackbone, head_names
from gradfast.train.results.checkpoint import load_checkpoint

HEAD = ["classifier.3.weight", "classifier.3.bias"]  # of the tests' model


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def weights(folder: str, name: str = "last.pt") -> dict[str, Tensor]:
    return load_checkpoint(Path(folder) / name)["model"]


def test_the_head_of_classifiers_and_detectors() -> None:
    assert head_names(torchvision.models.resnet18()) == {"fc.weight", "fc.bias"}
    assert head_names(torchvision.models.vgg11()) == {"classifier.6.weight", "classifier.6.bias"}
    detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    names = head_names(detector)
    assert "backbone.fpn.inner_blocks.0.0.weight" in names and not any(
        name.startswith("backbone.body") for name in names
    )


def test_norms_of_the_backbone_keep_their_statistics_and_dropout_goes_on() -> None:
    model = torchvision.models.mobilenet_v3_small()
    frozen = FrozenBackbone(model, 1)
    assert all(parameter.requires_grad for parameter in model.parameters())  # until the first epoch begins
    model.train()
    frozen.begin_epoch(0)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == HEAD
    assert not model.features[0][1].training and model.classifier[2].training
    model.train()
    frozen.begin_epoch(1)
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.features[0][1].training


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_run_that_trains_the_classifier_alone(opt: str, photos: Path, in_tmp: Path) -> None:
    more = ["--freeze-backbone", "--opt", opt, "--keep", 3, "--save-every-steps", 5, "--model-ema"]
    assert main(arguments(photos, *more, "--output", "run")) == 0
    assert changed(weights("run", "step-00000000.pt"), weights("run")) == set(HEAD)
    state = load_checkpoint(Path("run") / "last.pt")
    assert len(state["optimizer"]["state"]) == 2  # the optimiser knows nothing else
    assert changed(state["model"], state["average"]["module"]) == set(HEAD)


def test_a_backbone_that_joins_in_after_an_epoch(photos: Path, in_tmp: Path) -> None:
    settings = ["--freeze-backbone", 1, "--sched", "constant", "--lr", 0.01]
    assert main(arguments(photos, *settings, "--epochs", 2, "--keep", 3, "--output", "whole")) == 0
    first, second = weights("whole", "step-00000005.pt"), weights("whole", "step-00000010.pt")
    assert changed(weights("whole", "step-00000000.pt"), first) == set(HEAD)
    late = changed(first, second)
    assert set(HEAD) < late and "features.0.0.weight" in late and "features.0.1.running_mean" in late
    # Interrupted between the two, and while frozen, it goes the same way to the bit.
    assert main(arguments(photos, *settings, "--epochs", 1, "--output", "half")) == 0
    assert main(["train", "--resume", "half", "--epochs", "2"]) == 0
    assert untimed(Path("half/steps.csv")) == untimed(Path("whole/steps.csv"))
    assert not changed(weights("half"), weights("whole"))


def test_what_cannot_be_frozen(photos: Path, in_tmp: Path, refused: Callable[[list[str], str], str]) -> None:
    squeezenet = ["--model", "squeezenet1_1", "--freeze-backbone"]
    refused(arguments(photos, *squeezenet), "--freeze-backbone: SqueezeNet has no linear layer")
    refused(arguments(photos, "--freeze-backbone", "some"), "expected a number of epochs or all, got 'some'")
    assert main(arguments(photos, "--epochs", 1, "--freeze-backbone", "--output", "run")) == 0
    refused(["train", "--resume", "run", "--epochs", "2", "--freeze-backbone", "0"], "cannot change on --resume")
