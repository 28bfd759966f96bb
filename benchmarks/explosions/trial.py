"""Train one task under one cure, and say how it ended."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from cures import CURES
from scenarios import SCENARIOS
from torch import nn

from gradfast.guard import TrainingStopped

HELD_OUT = 10**6  # the number of a batch that no step trains on


@dataclass
class Result:
    """How a run ended.

    Attributes:
        outcome: "learnt", "stuck" (finite, but above `good`) or "diverged" (not finite, or above three times chance).
        losses: every few steps.
    """

    scenario: str
    broken: bool
    cure: str
    seed: int
    outcome: str
    final: float
    seconds: float
    losses: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.scenario}/{'broken' if self.broken else 'sound'}/{self.cure}/{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def still() -> None:
    """Have this process say nothing of each skipped step."""
    logging.getLogger("gradfast").setLevel(logging.ERROR)


def run(scenario: str, broken: bool, cure: str, seed: int) -> Result:
    torch.set_num_threads(1)
    start = time.perf_counter()
    torch.manual_seed(seed)
    task = SCENARIOS[scenario](seed, broken)
    stepper = CURES[cure].prepare(task)
    losses: list[float] = []
    rates = [group["lr"] for group in stepper.optimizer.param_groups]
    for step in range(task.steps):
        inputs, targets = task.batch(step)
        stepper.optimizer.zero_grad()
        loss = task.loss(task.model(inputs), targets)
        loss.backward()
        for group, rate in zip(stepper.optimizer.param_groups, rates):
            group["lr"] = rate * task.rate(step)
        losses.append(loss.item())
        try:
            stepper.step(loss)
        except TrainingStopped:  # the guard's last word; what it left is evaluated
            break
    final = _evaluate(task)
    finite = math.isfinite(final) and all(torch.isfinite(p).all() for p in task.model.parameters())
    outcome = "diverged" if not finite or final > 3 * task.chance else "stuck" if final > task.good else "learnt"
    every = max(1, len(losses) // 60)
    thinned = [value if math.isfinite(value) else 1e30 for value in losses[::every]]
    final = final if math.isfinite(final) else 1e30
    return Result(scenario, broken, cure, seed, outcome, final, time.perf_counter() - start, thinned)


def run_job(job: tuple[Any, ...]) -> Result:
    """`run` for a pool of processes, which find it in this module; they would not find `__main__` again."""
    return run(*job)


def _evaluate(task: Any) -> float:
    with torch.no_grad():
        for module in task.model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        if task.evaluate is not None:
            return task.evaluate(task.model)
        inputs, targets = task.batch(HELD_OUT)
        return task.loss(task.model(inputs), targets).item()
