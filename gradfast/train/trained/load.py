"""A trained model from its checkpoint, ready to be measured, used or exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfast.errors import UserError
from gradfast.extras import first_line
from gradfast.train.config import TrainConfig, from_dict, make_config
from gradfast.train.data.preprocess import ClassifierTransform, DetectorTransform, Transform, evaluation_margin
from gradfast.train.results.checkpoint import BEST, LAST, load_checkpoint
from gradfast.train.results.output import find_run
from gradfast.train.tasks import find_task
from gradfast.train.tasks.task import Task
from gradfast.version import __version__


class LoadedModel(NamedTuple):
    """What `load_model` returns: (model, classes, transform)."""

    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Any], Tensor]


@dataclass
class Trained:
    """A model as training left it, in evaluation mode, and what is known about it.

    Attributes:
        path: the checkpoint.
        config: the settings of its run.
        averaged: whether the weights are the moving average of ``--model-ema``, which is what the run measured.
        epoch, batch: epochs done, and batches of the next one.
        version: the gradfast that wrote it.
        fingerprint: of its data.
    """

    path: Path
    config: TrainConfig
    task: Task
    classes: tuple[str, ...]
    model: nn.Module
    averaged: bool
    epoch: int
    batch: int
    version: str
    fingerprint: str

    @property
    def transform(self) -> Transform:
        if self.config.task == "detect":
            return DetectorTransform()
        return ClassifierTransform(self.config.img_size, evaluation_margin(self.config.augment))

    def describe(self) -> str:
        within = f" and {self.batch} batches" if self.batch else ""
        average = ", its moving average" if self.averaged else ""
        return f"{self.path}: {self.config.model} after {self.epoch} epochs{within}{average}"


@dataclass(frozen=True)
class _Classes:
    """What building a model needs of the data."""

    classes: tuple[str, ...]


def find_checkpoint(name: str) -> Path:
    """A checkpoint by its path, or the best one of a run: its folder, or its name in ``runs/``.

    Raises:
        UserError: there is none.
    """
    path = find_run(name)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}; give one, or the folder of a run")
        return path
    for kind in (BEST, LAST):
        if (path / kind).is_file():
            return path / kind
    raise UserError(f"the folder {path} holds neither {BEST} nor {LAST}; give a checkpoint, or the folder of a run")


def read_trained(path: Path, average: bool = True) -> Trained:
    """Read a checkpoint and build its model, on the CPU.

    Args:
        average: take the moving average of the weights where there is one, as evaluation during training does.

    Raises:
        UserError: the checkpoint is damaged, another program's, or of a gradfast whose models this one does not know.
    """
    state = load_checkpoint(path)
    classes = tuple(state["classes"])
    other = "" if state["version"] == __version__ else f" of version {state['version']} (this is {__version__})"
    try:
        config = make_config(from_dict(state["config"]))
        task = find_task(config.task)
        model = build_bare(task, config, classes)
        averaged = average and "average" in state
        model.load_state_dict(state["average"]["module"] if averaged else state["model"])
    except (KeyError, TypeError, RuntimeError, ValueError, UserError) as error:
        raise UserError(
            f"cannot build the model of {path}, which a gradfast{other} wrote: {first_line(error)}"
        ) from error
    position = state["position"]
    return Trained(
        path=path,
        config=config,
        task=task,
        classes=classes,
        model=model.eval(),
        averaged=averaged,
        epoch=position["epoch"],
        batch=position["batch"],
        version=state["version"],
        fingerprint=state["fingerprint"],
    )


def build_bare(task: Task, config: TrainConfig, classes: tuple[str, ...]) -> nn.Module:
    """The model of a run before its first step; torch's generator is left as it was.

    What only chooses first weights is left out, but for Fixup, which adds parameters.
    """
    init = config.init if config.init == "fixup" else None
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = task.build_model(dataclasses.replace(config, weights=None, init=init), _Classes(classes))
    return model


def load_model(path: str | Path, device: str | torch.device = "cpu", average: bool = True) -> LoadedModel:
    """The model of a checkpoint of ``gradfast train``, ready to use.

        model, classes, transform = gradfast.train.load_model("runs/resnet50-elpv-1")
        with torch.inference_mode():
            logits = model(transform("cell.png")[None])          # [1, number of classes]
        print(classes[logits.argmax()])

    Args:
        path: a checkpoint, or the folder of a run, of which the best is taken (the last, where there is no best yet).
        device: where the model is to be.
        average: take the moving average of ``--model-ema`` where there is one, which is what the run measured.

    Returns:
        ``(model, classes, transform)``: the model in evaluation mode; the class names in the order of its outputs (a
        detector's label k is ``classes[k - 1]``); and a function from an image file or a PIL image to the tensor
        that the model takes, by the same steps as evaluation during training. A classifier takes a stack of them,
        [n, 3, size, size] float32, and returns logits [n, K]; a detector takes a list of them, [3, height, width]
        float32 each, and returns a dict of ``boxes`` (x1, y1, x2, y2 in pixels), ``labels`` and ``scores`` for each.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is another program's. Nothing in it is run.
    """
    trained = read_trained(find_checkpoint(str(path)), average)
    return LoadedModel(trained.model.to(device), trained.classes, trained.transform)
