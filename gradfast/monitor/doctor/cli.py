"""The command line of ``gradfast doctor``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfast.arguments import CommandParser
from gradfast.errors import UserError
from gradfast.extras import first_line, require
from gradfast.monitor.doctor.diagnosis import diagnose
from gradfast.nn.preserve import preserved

DESCRIPTION = """\
Examine a model on one batch before it is trained: what explodes, vanishes, dies or saturates, which scale is wrong, and
whether the learning rate is too high; with the evidence, and the line that mends it.

  gradfast doctor --model resnet50                      a torchvision model, on noise
  gradfast doctor --model resnet50 --data photos/       on photographs: one folder a class
  gradfast doctor my_project.train:example --lr 0.1     your own: a function that returns model, batch, loss_fn

The function returns (model, (inputs, targets), loss_fn), and the loss is loss_fn(model(inputs), targets)."""


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="gradfast doctor",
        description=DESCRIPTION,
    )
    parser.add_argument("target", nargs="?", metavar="MODULE:FUNCTION", help="returns (model, batch, loss_fn)")
    parser.add_argument("--model", metavar="NAME", help="a classification model of torchvision")
    parser.add_argument("--data", metavar="FOLDER", help="photographs, a folder for each class (default: noise)")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="classes on noise (default: 10)")
    parser.add_argument("--img-size", type=int, default=64, metavar="PIXELS", help="(default: 64)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="(default: 16)")
    parser.add_argument("--batches", type=int, default=3, metavar="N", help="of noise or photographs (default: 3)")
    parser.add_argument("--init", metavar="METHOD", help="initialise with gradfast.nn.init_model first")
    parser.add_argument("--lr", type=float, metavar="RATE", help="check this learning rate")
    parser.add_argument("--opt", default="sgd", metavar="sgd|adamw", help="whose step it is (default: sgd)")
    parser.add_argument("--clip-grad", type=float, metavar="NORM", help="clip that step to this global norm")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--all", action="store_true", help="show every layer")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots")
    return parser


def main(arguments: Sequence[str]) -> int:
    """``gradfast doctor``; returns the exit code: 0 with nothing found, 1 with findings."""
    options = build_parser().parse_args(arguments)
    if (options.target is None) == (options.model is None):
        raise UserError("give either --model NAME or MODULE:FUNCTION; gradfast doctor --help explains both")
    torch.manual_seed(options.seed)
    model, batches, loss_fn = _own(options.target) if options.target else _torchvision(options)
    batch = batches[0]
    if options.init:
        from gradfast.nn import init_model

        try:
            init_model(
                model, options.init, batch=batch[0] if isinstance(batch, (tuple, list)) else batch, verbose=False
            )
        except ValueError as error:
            raise UserError(f"--init: {error}") from error
    optimizer = _optimizer(options, model)
    _try_on(model, batch[0], options)
    diagnosis = diagnose(model, batch, loss_fn, lr=options.lr, optimizer=optimizer, more=batches[1:])
    diagnosis.show(options.all)
    if options.html:
        diagnosis.save_html(options.html)
        print(f"\nwritten: {options.html}")
    return 0 if diagnosis.ok else 1


def _try_on(model: nn.Module, images: Any, options: argparse.Namespace) -> None:
    """Say so where a torchvision model does not take these images, or returns no scores."""
    if options.model is None:
        return
    try:
        with preserved(model), torch.no_grad():
            output = model(images)
    except Exception as error:  # an assertion, a shape, a batch norm of one value: each model has its own
        raise UserError(
            f"--model {options.model} does not run on {len(images)} images of {options.img_size} pixels: "
            f"{first_line(error)}; see --img-size and --batch-size"
        ) from error
    if not isinstance(output, Tensor):
        raise UserError(
            f"--model {options.model} returns a {type(output).__name__} in training, not scores; give your own "
            "MODULE:FUNCTION, with a loss that takes it"
        )


def _optimizer(options: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer | None:
    from gradfast.optim import SGD, AdamW

    kinds: dict[str, Any] = {"sgd": SGD, "adamw": AdamW}
    if options.opt not in kinds:
        raise UserError(f"--opt {options.opt}: the doctor knows the first steps of {' and '.join(kinds)}")
    if options.lr is None:
        return None
    try:
        made: torch.optim.Optimizer = kinds[options.opt](model.parameters(), lr=options.lr, max_norm=options.clip_grad)
    except ValueError as error:
        raise UserError(f"--lr, --clip-grad: {error}") from error
    return made


def _own(target: str) -> tuple[nn.Module, list[Any], Callable[..., Tensor] | None]:
    module_name, _, function_name = target.partition(":")
    if not function_name:
        raise UserError(f"{target!r}: give it as MODULE:FUNCTION, such as my_project.train:example")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's folder, as `python -m` has it
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{target}: {first_line(error)}") from error
    made = function() if callable(function) else function
    if isinstance(made, Mapping):
        made = made.get("model"), made.get("batch"), made.get("loss_fn")
    if not (isinstance(made, (tuple, list)) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise UserError(f"{target} has to return (model, batch, loss_fn); it returned a {type(made).__name__}")
    return made[0], [made[1]], made[2] if len(made) == 3 else None


def _torchvision(options: argparse.Namespace) -> tuple[nn.Module, list[Any], Callable[..., Tensor]]:
    require("torchvision", "train", "gradfast doctor --model")
    import torchvision

    batches, classes = _images(options)
    try:
        model = torchvision.models.get_model(options.model, weights=None, num_classes=classes)
    except (ValueError, TypeError) as error:
        raise UserError(f"--model {options.model}: {first_line(error)}") from error
    return model, batches, F.cross_entropy


def _images(options: argparse.Namespace) -> tuple[list[Any], int]:
    """The batches, and the number of classes."""
    size, count, number = options.img_size, options.batch_size, max(1, options.batches)
    if options.data is None:
        classes = options.classes
        noise = [(torch.randn(count, 3, size, size), torch.randint(classes, (count,))) for _ in range(number)]
        return noise, classes
    from torchvision import datasets, transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    folder = Path(options.data)
    folder = folder / "train" if (folder / "train").is_dir() else folder
    try:
        photos = datasets.ImageFolder(str(folder), transforms.Compose(steps))
        chosen = torch.randperm(len(photos))[: count * number].tolist()
        samples = [photos[index] for index in chosen]
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"--data {folder}: {first_line(error)}") from error
    images, targets = (torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*samples))
    return list(zip(images.split(count), targets.split(count))), len(photos.classes)
