"""What the trainer asks of a task, and nothing about any particular one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import BatchLoader
from gradfast.train.data.images import BadImage
from gradfast.train.machine.place import Place
from gradfast.train.machine.processes import World


class AnyBatch(Protocol):
    """Some images on their way to the device, with what is to be learnt about them."""

    @property
    def bad(self) -> list[BadImage]:
        """Files that should have been in it."""

    @property
    def size(self) -> int:
        """How many images it holds."""

    def emptied(self) -> AnyBatch:
        """The same without its images."""


class TaskData(Protocol):
    """What a run learns from and is measured on."""

    bad: list[BadImage]
    workers: int

    @property
    def classes(self) -> Sequence[str]: ...

    def fingerprint(self) -> str:
        """Changes where the images or their split do."""

    def loaders(self, config: TrainConfig, pin_memory: bool) -> tuple[BatchLoader, BatchLoader]:
        """(training, evaluation) loaders."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the held-out images found.

    Attributes:
        values: the task's columns of summary.csv, in the order of `Task.columns`.
        loss: what ``--sched plateau`` watches: lower is better.
        illustrate: writes pictures of it into a run folder, where this is the best epoch so far.
    """

    values: Mapping[str, float]
    loss: float
    illustrate: Callable[[Path], None] | None = None


class Meter(Protocol):
    """Gathers one pass over the held-out images."""

    def add(self, model: nn.Module, batch: Any) -> None:
        """Measure a model, which is in evaluation mode, on a batch."""

    def join(self, world: World) -> None:
        """Take in what the other processes gathered; all of them come to the same."""

    def result(self) -> Evaluation: ...


class Objective(Protocol):
    """How the batches of one run become losses, and its held-out images a result."""

    @property
    def components(self) -> Sequence[str]:
        """Names of the parts of the loss, where it has several."""

    @property
    def fewest(self) -> int:
        """How many images a training batch needs where batch norms see no others."""

    @property
    def mixes(self) -> bool:
        """Whether each image of a training batch is mixed with the one before it."""

    def weight(self, batch: Any) -> float:
        """What the loss of a training batch is a mean over: the sum of its images' weights."""

    def losses(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a training batch, averaged over its images, and its parts by the names of `components`.

        Of a batch without images, as one process of several may have, they are zeros that depend on every parameter.
        """

    def meter(self) -> Meter: ...


class Panel(NamedTuple):
    """One drawing of curves.png: a title, and the columns of summary.csv that it shows with what to call them."""

    title: str
    lines: Sequence[tuple[str, str]]


class Task(Protocol):
    """Everything in which one kind of training differs from another."""

    @property
    def columns(self) -> Sequence[str]:
        """What evaluation adds to summary.csv."""

    @property
    def score(self) -> str:
        """The one of `columns` by which the best epoch is chosen; higher is better."""

    @property
    def score_key(self) -> str:
        """What checkpoints call it."""

    @property
    def panels(self) -> Sequence[Panel]:
        """Of curves.png, beside the gradient norm's."""

    def build_data(self, config: TrainConfig, report: Callable[[str], None]) -> Any:
        """`TaskData`: list, check and split the images of ``--data``."""

    def build_model(self, config: TrainConfig, data: Any) -> nn.Module:
        """A model for the classes of `data`, drawn from torch's global generator or read from ``--weights``."""

    def build_objective(self, config: TrainConfig, data: Any, place: Place) -> Objective: ...

    def describe_data(self, config: TrainConfig, data: Any) -> str:
        """What there is to learn from, in a line."""

    def describe_evaluation(self, row: Mapping[str, Any]) -> str:
        """What an epoch's row of summary.csv says of the held-out images."""

    def describe_result(self, summary: Sequence[Mapping[str, Any]], best: tuple[int, float], data: Any) -> list[str]:
        """The last and the best epoch, beside what can be had without learning."""
