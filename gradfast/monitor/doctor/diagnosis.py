"""`gradfast.diagnose`: examine a model on a batch, and say what is wrong with it, why, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.monitor.doctor import rate, scale, signal
from gradfast.monitor.doctor.finding import ERROR, Finding
from gradfast.monitor.doctor.probe import Measurement, measure
from gradfast.monitor.doctor.rate import RateCheck, check_rate
from gradfast.nn.graph import Structure, read_structure
from gradfast.nn.preserve import preserved

_SIGNAL = (
    signal.forward,
    signal.backward,
    signal.no_gradient,
    signal.dead_relus,
    signal.saturated,
    signal.half_precision,
)


@dataclass
class Diagnosis:
    """What `diagnose` found; printed, it is a text, `show()` a table, `save_html()` a page with plots.

    Attributes:
        findings: errors first.
        measurement: everything that was measured, layer by layer.
        rate: what a step of the learning rate would do, or None.
    """

    model: str
    findings: list[Finding] = field(default_factory=list)
    measurement: Measurement = field(default_factory=Measurement)
    rate: RateCheck | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def kinds(self) -> set[str]:
        """Which kinds of finding there are."""
        return {finding.kind for finding in self.findings}

    def summary(self) -> str:
        """One line: loss, gradient norm, and the rate at which a plain step stops descending."""
        found = self.measurement
        layers = {passage.name for passage in found.of_kind("layer")}
        text = f"{self.model}: {len(layers)} layers, loss {found.loss:.4g}, gradient norm {found.grad_norm:.4g}"
        if self.rate is not None and math.isfinite(self.rate.limit):
            text += f", a first step descends below lr {self.rate.limit:.2g}"
        return text

    def __str__(self) -> str:
        verdict = "nothing found" if self.ok else f"{len(self.findings)} found"
        return "\n".join([f"{self.summary()}; {verdict}", *map(str, self.findings)])

    def show(self, every_layer: bool = False) -> None:
        """Print tables to the terminal; needs rich."""
        from gradfast.monitor.doctor.terminal import show

        show(self, every_layer)

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with plots; needs matplotlib."""
        from gradfast.monitor.doctor.page import save_html

        save_html(self, Path(path))


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    more: Iterable[Any] = (),
) -> Diagnosis:
    """Examine a model on a batch: four forward and three backward passes, in the mode (train or eval) that it is in.

    Parameters, buffers, `.grad`, training modes and the random state are afterwards as they were, to the bit.
    docs/doctor.md lists what is looked for, and the thresholds.

    Args:
        batch: (inputs, targets); inputs may be a tensor, or a tuple or dict of arguments. Or inputs alone, a tensor or
            a dict, which are then the targets, too: for models that return their loss, and for autoencoders.
        loss_fn: takes (output, targets) or the output alone, returns a tensor of one element. None takes
            `output.loss`, or the sum of a dict of losses.
        lr: check this learning rate, as of plain gradient descent.
        optimizer: take the rate, the kind of update (sgd, or Adam's signs) and `max_norm` from it.
        more: further batches, run once each, for what the first does not show; the measurement is the first's.

    Raises:
        ValueError: no loss_fn, and the model returns no loss; or one that takes or returns something else.
    """
    structure = read_structure(model)
    found, findings = _examine(model, batch, loss_fn, structure)
    step = None
    if not any(finding.kind == "nonfinite" for finding in findings):
        step = check_rate(model, batch, loss_fn, lr, optimizer)
        if lr is not None or optimizer is not None:
            findings += rate.findings(step)
    for number, other in enumerate(more, start=2):
        known = {finding.kind for finding in findings}
        for finding in _examine(model, other, loss_fn, structure)[1]:
            if finding.kind not in known:
                finding.evidence += f" (in batch {number})"
                findings.append(finding)
    findings.sort(key=lambda finding: finding.severity != ERROR)
    return Diagnosis(type(model).__name__, findings, found, step)


def _examine(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None, structure: Structure
) -> tuple[Measurement, list[Finding]]:
    """One batch: what was measured, and all that is found but for the learning rate."""
    with preserved(model):
        found = measure(model, batch, loss_fn)
    findings = list(scale.inputs(batch))
    broken = list(signal.nonfinite(found, structure))
    if findings and broken and not math.isfinite(found.passages[0].in_rms):
        broken = []  # the batch is to blame, and that is said already
    findings += broken
    for check in _SIGNAL:
        if not broken or check in (signal.forward, signal.no_gradient):
            findings += check(found, structure)
    findings += scale.loss_scale(found, batch, loss_fn)
    findings += scale.weights(model, found, structure)
    return found, findings
