"""What steps left on the device, fetched for many of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradfast._load import native
from gradfast.clip.reduction import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self._steps: list[_Pending] = []
        self._ranks = None if process_group is None else Ranks(process_group)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, optimizer: Any, loss: Tensor | float | None) -> None:
        """Copy, on the device, what the step just enqueued will leave behind. Nothing waits."""
        kept = None if loss is None else torch.as_tensor(loss).detach().reshape(()).double()
        engine, sharding = optimizer._stepped_engine(), optimizer._sharding
        if sharding is None:
            sums = engine.member_sums()
        else:  # of whole parameters, the same on all ranks
            sums = [(list(range(len(sharding.names))), sharding.reduction.sums.clone())]
        self._steps.append(_Pending(step, engine.report_bytes(), kept, sums))

    def fetch(self) -> list[StepOutcome]:
        """Wait for all steps so far and return them, oldest first."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        reports = torch.stack([each.report for each in steps]).cpu()
        losses = [each.loss for each in steps if each.loss is not None]
        values = iter(self._of_all_ranks(torch.stack(losses)).tolist() if losses else [])
        return [
            StepOutcome(
                each.step,
                native.Report(reports[number]),
                None if each.loss is None else next(values),
                [(indices, sums.tolist()) for indices, sums in each.sums] if _is_interesting(reports[number]) else [],
            )
            for number, each in enumerate(steps)
        ]

    def _of_all_ranks(self, losses: Tensor) -> Tensor:
        """The mean over the ranks, each of which had batches of its own."""
        if self._ranks is None:
            return losses
        return self._ranks.all_reduce(losses, "SUM") / self._ranks.group.size()


def _is_interesting(report: Tensor) -> bool:
    """Whether anybody will ask for the parameters' norms: not in the many steps where all went well."""
    found = native.Report(report)
    return bool(found.skipped) or found.coefficient != 1.0 or not found.norm < float("inf")
