"""The monitor: what every layer's gradient, weight and update do, as by-products of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.monitor.events import Event, SpikeRule, worst
from gradfast.monitor.explain import explain
from gradfast.monitor.gather import Source, StepNorms
from gradfast.monitor.grouping import add_watched, group_by_module, inside, join
from gradfast.monitor.sinks import Sink
from gradfast.monitor.transfer import Transfer

_log = logging.getLogger("gradfast.monitor")
_MOST_EXPLANATIONS = 10  # a run in which every step is bad must not run forward twice for ever


class Monitor:
    """Watches an optimiser; nothing in the training loop changes.

        monitor = gradfast.Monitor(optimizer, model=model, every=50, sinks=[JSONL("runs/today")])
        ...                              # train as before
        monitor.close()

    After the first step and every `every`-th it samples, per group of parameters: the gradient's norm before clipping
    (`l2_norm/grad/GROUP`; of the optimiser's `norm_type`, if that is another), the weights' (`l2_norm/param/GROUP`),
    the update's over the weights' (`update_ratio/GROUP`), and the share of the gradient that is not finite
    (`nonfinite/GROUP`). With them go `grad_norm` and, after clipping, `grad_norm_clipped`, the `clip_coef`, and of all
    steps since the last sample `grad_norm_max`, `clip_fraction` and `nonfinite_steps`. Groups are modules, no more than
    `most_groups` of them; `watch` adds others. Of sharded parameters the gradients' norms are of the whole, the other
    numbers of this rank's part.

    With gradfast's optimisers all gradient norms come from the step's own pass, so that every step is seen; with others
    they are measured at samples. No step waits for a GPU: numbers are copied as the device gets to them and read when
    they have arrived. A sample takes a copy of the parameters for the time of the step.

    A step with a NaN or infinite norm, or a norm `spike` times the median of the 128 before, is an event: logged, and
    sent to the sinks with the worst parameters. On the CPU, where a bad step is known at once, its forward pass is run
    once more and the message names the first bad layer; on CUDA, where it is known later, `examine` does that for a
    batch.

    Args:
        model: for the names of parameters, and to run forward once more when a step was bad.
        every: steps between samples.
        sinks: see `gradfast.monitor.sinks`.
        most_groups: groups of parameters are modules of the deepest level that has no more than these.
        watch: further modules or parameters, by name.
        spike: how many times the median a norm must be to be an event; `inf` for never.
        start_step: steps done before, in a run that is resumed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        every: int = 50,
        sinks: Iterable[Sink] = (),
        *,
        most_groups: int = 24,
        watch: Iterable[str] = (),
        spike: float = 10.0,
        start_step: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        self.source = Source(optimizer, model)
        self.model, self.every, self.sinks, self.step = model, every, list(sinks), start_step
        self.groups = add_watched(group_by_module(self.source.names, most_groups), self.source.names, watch)
        self.last: dict[str, Any] = {}  # of the latest sample that has arrived: "step", "grad", "param", "update"
        self.events: list[Event] = []
        self._spikes = SpikeRule(spike)
        self._transfer = Transfer()
        self._window: list[StepNorms] = []
        self._logged: dict[str, Any] = {}
        self._before: list[Tensor] | None = None
        self._first, self._sampling = True, False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._explanations: dict[int, str] = {}
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        if model is not None:
            self._handles.append(model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True))

    # ---------------------------------------------------------------- for the user

    def log(self, **values: float | Tensor) -> None:
        """Send these along with the next sample, as `loss=loss`: numbers, or 0-d tensors, which nothing waits for."""
        self._logged.update({name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})

    def top(self, count: int = 10, what: str = "grad") -> list[tuple[str, float]]:
        """Parameters with the largest "grad", "param" or "update" norm, or update "ratio", in the latest sample."""
        values = self._latest(what)
        return worst(self.source.names, values, count)

    def norm(self, module: str, what: str = "grad") -> float:
        """Norm of any module's gradient, weights or update in the latest sample."""
        values = self._latest(what)
        return join(values, inside(self.source.names, module), self.source.power if what == "grad" else 2.0)

    def examine(self, *arguments: Any, **keywords: Any) -> str:
        """Run the model forward on these inputs, as it is now, and say which layer first puts out NaN or infinity."""
        if self.model is None:
            raise ValueError("the monitor was made without model=")
        return explain(self.model, arguments, keywords, dict(zip(self.source.names, self._latest("grad"))))

    def flush(self) -> None:
        """Wait for what is on its way, and hand it to the sinks."""
        self._transfer.receive(wait=True)

    def close(self) -> None:
        """Send the steps since the last sample, take the hooks off, and close the sinks."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._window:
            self._send(None)
        self.flush()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _latest(self, what: str) -> Sequence[float]:
        if not self.last:
            self.flush()
        if what == "ratio" and self.last:
            return [u / p if p else 0.0 for u, p in zip(self.last["update"], self.last["param"])]
        if what not in ("grad", "param", "update") or not self.last:
            raise ValueError(f"there is no sample yet, or no {what!r}: it is 'grad', 'param', 'update' or 'ratio'")
        values: Sequence[float] = self.last[what]
        return values

    # ---------------------------------------------------------------- in the step: nothing here may wait

    def _keep_inputs(self, model: nn.Module, arguments: Any, keywords: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs = arguments, keywords

    def _before_step(self) -> None:
        self.step += 1
        self._sampling = self.step % self.every == 0 or self._first
        self._first = False
        if self._sampling:
            self._before = self.source.copies()

    def _after_step(self) -> None:
        norms = self.source.every_step()
        if norms is None and self._sampling:
            norms = self.source.measured()
        if norms is not None:
            self._window.append(norms)
            if norms.grad_norm.device.type == "cpu" and not math.isfinite(norms.grad_norm.item()):
                self._explain(norms)
        if self._sampling:
            self._send(self._before)
            self._before = None
        self._transfer.receive()

    def _send(self, before: list[Tensor] | None) -> None:
        """Put the window and the sample into one tensor, and that on its way."""
        window, logged, device = self._window, self._logged, self.source.device
        self._window, self._logged = [], {}
        pieces = [torch.stack([column for step in window for column in (step.grad_norm, step.clip_coef)])]
        pieces.append(torch.cat([step.sums for step in window]))
        pieces += self.source.sample(before, window[-1].grad_norm) if before is not None else []
        extra = [torch.as_tensor(value, dtype=torch.float64).to(device, non_blocking=True) for value in logged.values()]
        pieces.append(torch.stack(extra) if extra else torch.zeros(0, dtype=torch.float64, device=device))
        names, step, steps, sampled = list(logged), self.step, len(window), before is not None
        rate = self.source.optimizer.param_groups[0].get("lr")
        rate = rate if isinstance(rate, (int, float)) else None
        values = torch.cat([piece.to(device).flatten() for piece in pieces])
        self._transfer.send(values, lambda numbers: self._arrived(numbers, step, steps, sampled, names, rate))

    def _explain(self, norms: StepNorms) -> None:
        if self.model is None or self._inputs is None or len(self._explanations) >= _MOST_EXPLANATIONS:
            return
        each = dict(zip(self.source.names, self._roots(norms.sums.tolist(), norms.grad_norm.item())))
        self._explanations[self.step] = explain(self.model, *self._inputs, each)

    # ---------------------------------------------------------------- when the numbers have arrived

    def _roots(self, sums: Sequence[float], norm: float) -> list[float]:
        """Norms from sums of powers. Under a loss scale these are of the scaled gradients, and `norm` is not."""
        power = self.source.power
        root = 1.0 if power == math.inf else 1.0 / power
        whole = (max(sums) if power == math.inf else sum(sums)) ** root
        unscale = norm / whole if math.isfinite(norm) and 0 < whole < math.inf else 1.0
        return [value**root * unscale if math.isfinite(value) else value for value in sums]

    def _arrived(
        self, numbers: list[float], step: int, steps: int, sampled: bool, names: list[str], rate: float | None
    ) -> None:
        count = len(self.source.names)
        norms, coefficients = numbers[0 : 2 * steps : 2], numbers[1 : 2 * steps : 2]
        rows = [self._roots(numbers[2 * steps + i * count :][:count], norms[i]) for i in range(steps)]
        first = step - steps + 1 if self.source.native else step
        for sink in self.sinks:
            sink.history(first, norms, coefficients)
        for number in range(steps):
            self._look_for_events(first + number, norms[number], coefficients[number], rows[number])
        if sampled:
            start = 2 * steps + steps * count
            param, update, bad = (numbers[start + i * count :][:count] for i in range(3))
            self.last = {"step": step, "grad": rows[-1], "param": param, "update": update}
            metrics = {"grad_norm": norms[-1], "grad_norm_clipped": norms[-1] * coefficients[-1]}
            metrics |= {"clip_coef": coefficients[-1], **self._of_window(norms, coefficients)}
            metrics |= {"lr": rate} if rate is not None else {}
            metrics |= dict(zip(names, numbers[start + 3 * count :]))
            for sink in self.sinks:
                sink.write(step, metrics | self._of_groups(rows[-1], param, update, bad))

    def _of_window(self, norms: list[float], coefficients: list[float]) -> dict[str, float]:
        finite = [norm for norm in norms if math.isfinite(norm)]
        clipped = [c < 1 for norm, c in zip(norms, coefficients) if math.isfinite(norm)]
        return {
            "grad_norm_max": max(finite, default=math.nan),
            "clip_fraction": sum(clipped) / len(clipped) if clipped else 0.0,
            "nonfinite_steps": float(len(norms) - len(finite)),
        }

    def _of_groups(
        self, grad: list[float], param: list[float], update: list[float], bad: list[float]
    ) -> dict[str, float]:
        metrics = {}
        sizes = [parameter.numel() for parameter in self.source.parameters]
        for group, indices in self.groups.items():
            weights = join(param, indices)
            metrics[f"l2_norm/grad/{group}"] = join(grad, indices, self.source.power)
            metrics[f"l2_norm/param/{group}"] = weights
            metrics[f"update_ratio/{group}"] = join(update, indices) / weights if weights else 0.0
            total = sum(sizes[i] for i in indices)
            metrics[f"nonfinite/{group}"] = sum(bad[i] * sizes[i] for i in indices) / total if total else 0.0
        return metrics

    def _look_for_events(self, step: int, norm: float, coefficient: float, row: list[float]) -> None:
        threshold = self._spikes.threshold(norm)
        if math.isfinite(norm) and threshold is None:
            return
        named = worst(self.source.names, row)
        sizes = ", ".join(f"{name} {size:.4g}" for name, size in named)
        if not math.isfinite(norm):
            skips = self.source.native and getattr(self.source.optimizer, "nonfinite", "") == "skip"
            event = Event(step, "nonfinite", norm, None, "skipped" if skips else "applied", named)
            event.message = f"step {step}: the gradient norm is {norm} ({event.action}); worst: {sizes}"
        else:
            action = "clipped" if coefficient < 1 else "applied"
            event = Event(step, "spike", norm, threshold, action, named)
            event.message = (
                f"step {step}: the gradient norm is {norm:.4g}, above {threshold:.4g} ({action}); worst: {sizes}"
            )
        if step in self._explanations:
            event.message += f". {self._explanations[step]}"
        self.events.append(event)
        _log.warning(event.message)
        for sink in self.sinks:
            sink.event(event)
