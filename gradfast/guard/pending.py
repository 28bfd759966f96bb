"""What steps left on the device, fetched for many of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfast._load import native


@dataclass
class StepOutcome:
    """One step as the host learns of it."""

    step: int
    report: Any  # native.Report
    loss: float | None
    sums: list[tuple[list[int], list[float]]]  # a device: indices of parameters, their sums of powers


@dataclass
class _Pending:
    step: int
    report: Tensor
    loss: Tensor | None
    sums: list[tuple[list[int], Tensor]]


class PendingSteps:
    """Keeps copies of a step's report where they are, and brings all to the host together: one wait for many steps."""

    def __init__(self) -> None:
        self._steps: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, engine: Any, loss: Tensor | float | None) -> None:
        """Copy, on the device, what the step just enqueued will leave behind. Nothing waits."""
        kept = None if loss is None else torch.as_tensor(loss).detach().reshape(()).double()
        self._steps.append(_Pending(step, engine.report_bytes(), kept, engine.member_sums()))

    def fetch(self) -> list[StepOutcome]:
        """Wait for all steps so far and return them, oldest first."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        reports = torch.stack([each.report for each in steps]).cpu()
        losses = [each.loss for each in steps if each.loss is not None]
        values = iter(torch.stack(losses).tolist() if losses else [])
        return [
            StepOutcome(
                each.step,
                native.Report(reports[number]),
                None if each.loss is None else next(values),
                [(indices, sums.tolist()) for indices, sums in each.sums] if _is_interesting(reports[number]) else [],
            )
            for number, each in enumerate(steps)
        ]


def _is_interesting(report: Tensor) -> bool:
    """Whether anybody will ask for the parameters' norms: not in the many steps where all went well."""
    found = native.Report(report)
    return bool(found.skipped) or found.coefficient != 1.0 or not found.norm < float("inf")
