"""The numbers of each step of an epoch, fetched from the device in batches so that no step waits for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfast.train.stopwatch import Span, durations

COLUMNS = ("loss", "grad_norm", "clip_coef", "lr", "images", "seconds")
_ON_DEVICE = ("loss", "grad_norm", "clip_coef")


class Tally:
    """Columns of one epoch, a row per optimiser step.

    `add` keeps 0-d tensors as they are; `drain` moves all that wait with one transfer. Read the columns after a
    drain. `grad_norm` is the global norm before clipping, and grad_norm * clip_coef the one after it.

    Args:
        components: names of the parts of the loss, each a column after the others.
    """

    def __init__(self, components: Sequence[str] = ()) -> None:
        self.components = tuple(components)
        self.columns: dict[str, list[float]] = {name: [] for name in (*COLUMNS, *components)}
        self.seconds = 0.0  # spent training, in this and in interrupted parts of the epoch
        self.skipped_steps = 0
        self.phases: dict[str, float] = {}  # seconds of the epoch's steps by phase of the stopwatch
        self._waiting: list[Tensor] = []
        self._spans: list[Sequence[Span]] = []

    def __len__(self) -> int:
        return len(self.columns["lr"])

    @property
    def waiting(self) -> int:
        """Steps not drained yet."""
        return len(self._waiting)

    def add(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        clip_coef: Tensor,
        lr: float,
        images: int,
        components: Mapping[str, Tensor] | None = None,
        spans: Sequence[Span] = (),
    ) -> None:
        """One step: its mean loss, norm before clipping and clip coefficient (0-d), its rate and number of images.

        Args:
            components: the parts of the loss (0-d) by the names given at the start.
            spans: of the stopwatch, since the step before.
        """
        device = loss.device
        parts = [(components or {})[name] for name in self.components]
        row = [value.detach().to(device, torch.float32) for value in (loss, grad_norm, clip_coef, *parts)]
        self._waiting.append(torch.stack(row))  # a copy: the optimiser may reuse its tensors in the next step
        self.columns["lr"].append(lr)
        self.columns["images"].append(images)
        self._spans.append(spans)

    def drain(self) -> None:
        if self._waiting:
            for row in torch.stack(self._waiting).tolist():
                for name, value in zip((*_ON_DEVICE, *self.components), row, strict=True):
                    self.columns[name].append(value)
            self._waiting.clear()
        for spans in self._spans:  # whose end the device has passed, since it gave away what was enqueued after
            seconds = durations(spans)
            self.columns["seconds"].append(sum(seconds.values()))
            for phase, value in seconds.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + value
        self._spans.clear()

    def share(self, phase: str) -> float:
        """What a phase took of the time of the epoch's steps, 0 to 1."""
        total = sum(self.phases.values())
        return self.phases.get(phase, 0.0) / total if total > 0 else 0.0

    def images(self) -> int:
        return int(sum(self.columns["images"]))

    def images_per_second(self) -> float:
        return self.images() / self.seconds if self.seconds > 0 else 0.0

    def loss(self, name: str = "loss") -> float:
        """Mean over the images of the epoch; `name` may be one of the components."""
        weighted = sum(a * n for a, n in zip(self.columns[name], self.columns["images"], strict=True))
        return weighted / self.images() if self.images() else math.nan

    def nonfinite_losses(self) -> list[str]:
        """The components, or the loss where it has none, that were NaN or infinite in some step."""
        names = self.components or ("loss",)
        return [name for name in names if not all(map(math.isfinite, self.columns[name]))]

    def recent(self, name: str, steps: int = 20) -> float:
        """Mean of the last finite values of a column."""
        values = [value for value in self.columns[name][-steps:] if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def grad_norm(self) -> float:
        """Mean of the finite norms."""
        return self.recent("grad_norm", len(self))

    def grad_norm_max(self) -> float:
        """Largest finite norm."""
        return max((norm for norm in self.columns["grad_norm"] if math.isfinite(norm)), default=math.nan)

    def clip_fraction(self) -> float:
        """Share of the steps with a finite norm that were scaled down."""
        pairs = zip(self.columns["grad_norm"], self.columns["clip_coef"], strict=True)
        clipped = [coefficient < 1 for norm, coefficient in pairs if math.isfinite(norm)]
        return sum(clipped) / len(clipped) if clipped else 0.0

    def state_dict(self) -> dict[str, Any]:
        self.drain()
        return {
            "columns": self.columns,
            "seconds": self.seconds,
            "phases": self.phases,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {"seconds": [math.nan] * len(state["columns"]["lr"]), **state["columns"]}
        self.columns = {name: list(known[name]) for name in (*COLUMNS, *self.components)}
        self.phases = dict(state.get("phases", {}))
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._waiting.clear()
        self._spans.clear()
