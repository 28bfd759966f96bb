"""The monitor: what every layer's gradient, weight and update do, as by-products of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.monitor.events import Event, SpikeRule, worst
from gradfast.monitor.explain import explain, explain_by_norms
from gradfast.monitor.gather import Source
from gradfast.monitor.grouping import add_watched, group_by_module, inside, join
from gradfast.monitor.metrics import GroupMetrics, StepView, of_window, roots
from gradfast.monitor.sinks import Sink, on_first_rank
from gradfast.monitor.transfer import Transfer
from gradfast.monitor.window import StepNorms, pack, unpack

_log = logging.getLogger("gradfast.monitor")
_GRADIENTS = ("grad", "clipped")  # before and after clipping, of the optimiser's norm_type
_MOST_EXPLANATIONS = 10  # a run in which every step is bad must not run forward twice for ever


class Monitor:
    """Watches an optimiser; nothing in the training loop changes.

        monitor = gradfast.Monitor(optimizer, model=model, every=50, sinks=[JSONL("runs/today")])
        ...                              # train as before
        monitor.close()

    After the first step and every `every`-th it samples, per group of parameters: the gradient's norm before clipping
    and after all clipping (`l2_norm/grad/GROUP`, `l2_norm/grad_clipped/GROUP`; of the optimiser's `norm_type`, if that
    is another), the weights' (`l2_norm/param/GROUP`), the update's over the weights' (`update_ratio/GROUP`), and the
    share of the gradient that is not finite (`nonfinite/GROUP`). With them go `grad_norm` and, after clipping,
    `grad_norm_clipped`, the `clip_coef`, and of all steps since the last sample `grad_norm_max`, `clip_fraction` and
    `nonfinite_steps`. Groups are modules, no more than `most_groups` of them; `watch` adds others.

    Where a policy or a group's own `max_norm` clips parameters one by one, `clip_fraction/GROUP` is how often it did:
    the share of the group's parameters and of the steps since the last sample. For `AGC` and `Value`, which clip units
    and elements before the norm is measured, it is the share of those in the sampled step, and `grad_norm` and
    `l2_norm/grad/GROUP` are from before them, for which a sample takes a pass of its own; the other steps' norms are
    those that were left.

    Of sharded parameters all numbers are of the whole, the same on all ranks, joined by one small all-reduce a sample
    and process group; so every rank needs a monitor, with the same `every`. Sinks and the log are for the first rank.

    With gradfast's optimisers all gradient norms come from the step's own pass, so that every step is seen; with others
    they are measured at samples. No step waits for a GPU: numbers are copied as the device gets to them and read when
    they have arrived. A sample takes a copy of the parameters for the time of the step.

    A step with a NaN or infinite norm, or a norm `spike` times the median of the 128 before, is an event: logged, and
    sent to the sinks with the worst parameters, and the message names the first bad layer. On the CPU, where a step
    that is not finite is known at once, its forward pass is run once more for that; on CUDA, where it is known later,
    and for spikes, it is the first layer on the way back whose gradient's norm went wrong, against the last good step.
    `examine` looks for the layer of the forward pass in a batch that was kept.

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
        self.model, self.every, self.step = model, every, start_step
        self.sinks = list(sinks) if on_first_rank() else []
        self.groups = add_watched(group_by_module(self.source.names, most_groups), self.source.names, watch)
        self._metrics = GroupMetrics(self.source, self.groups)
        self.last: dict[str, Any] = {}  # of the latest sample that has arrived: "step", "grad", "clipped", "param", ...
        self.events: list[Event] = []
        self._spikes = SpikeRule(spike)
        self._transfer = Transfer()
        self._window: list[StepNorms] = []
        self._logged: dict[str, Any] = {}
        self._before: list[Tensor] | None = None
        self._memory = self.source.memory()
        self._unclipped: list[Tensor] = []
        self._first, self._sampling = True, False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._explanations: dict[int, str] = {}
        self._quiet: list[float] = []  # the parameters' norms in the last step that was no event
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
        """Parameters with the largest "grad", "clipped", "param" or "update" norm, or "ratio" of update to weights."""
        values = self._latest(what)
        return worst(self.source.names, values, count)

    def norm(self, module: str, what: str = "grad") -> float:
        """Norm of any module's gradient, weights or update in the latest sample."""
        values = self._latest(what)
        return join(values, inside(self.source.names, module), self.source.power if what in _GRADIENTS else 2.0)

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
        if what not in (*_GRADIENTS, "param", "update") or not self.last:
            known = "'grad', 'clipped', 'param', 'update' or 'ratio'"
            raise ValueError(f"there is no sample yet, or no {what!r}: it is {known}")
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
        self._memory = self.source.memory()
        if self._sampling:
            self._before, self._unclipped = self.source.copies(), self.source.unclipped()

    def _after_step(self) -> None:
        norms = self.source.every_step(self._memory)
        if norms is None and self._sampling:
            norms = self.source.measured(self._memory)
        if norms is not None:
            self._window.append(norms)
            if norms.grad_norm.device.type == "cpu" and not math.isfinite(norms.grad_norm.item()):
                self._explain(norms)
        if self._sampling:
            self._send(self._before)
            self._before, self._unclipped = None, []
        self._transfer.receive()

    def _send(self, before: list[Tensor] | None) -> None:
        """Put the window and the sample into one tensor, and that on its way."""
        window, logged, device = self._window, self._logged, self.source.device
        self._window, self._logged = [], {}
        pieces = [pack(window)]
        pieces += [self.source.sample(before, window[-1].grad_norm, self._unclipped)] if before is not None else []
        pieces += [torch.as_tensor(value, dtype=torch.float64).reshape(1) for value in logged.values()]
        values = torch.cat([piece.to(device, non_blocking=True) for piece in pieces])
        names, step, sampled = list(logged), self.step, before is not None
        rate = self.source.optimizer.param_groups[0].get("lr")
        rate = rate if isinstance(rate, (int, float)) else None
        self._transfer.send(values, lambda numbers: self._arrived(numbers, step, window, sampled, names, rate))

    def _explain(self, norms: StepNorms) -> None:
        if self.model is None or self._inputs is None or len(self._explanations) >= _MOST_EXPLANATIONS:
            return
        sizes = roots(norms.sums.tolist(), norms.grad_norm.item(), self.source.power)
        each = dict(zip(self.source.names, sizes))
        self._explanations[self.step] = explain(self.model, *self._inputs, each)

    # ---------------------------------------------------------------- when the numbers have arrived

    def _arrived(
        self,
        numbers: list[float],
        step: int,
        window: list[StepNorms],
        sampled: bool,
        names: list[str],
        rate: float | None,
    ) -> None:
        count = len(self.source.names)
        steps, rest = unpack(numbers, window, count)
        views = [StepView(self.source, each) for each in steps]
        first = step - len(views) + 1 if self.source.native else step
        for sink in self.sinks:
            sink.history(first, [view.norm for view in views], [view.coefficient for view in views])
        for number, view in enumerate(views):
            self._look_for_events(first + number, view)
        if sampled:
            sample, rest = self._take_sample(rest)
            parameters = {"grad": views[-1].grad, "clipped": views[-1].clipped, **sample}
            self.last = {"step": step, **parameters}
            metrics = of_window(views) | ({"lr": rate} if rate is not None else {}) | dict(zip(names, rest))
            for sink in self.sinks:
                sink.write(step, metrics | self._metrics.of(views, parameters))

    def _take_sample(self, numbers: Sequence[float]) -> tuple[dict[str, Sequence[float]], Sequence[float]]:
        """A sample's rows by name, and what came behind them."""
        names = ["param", "update", "bad"] + (["grad", "clipped_units"] if self.source.before_norm is not None else [])
        count = len(self.source.names)
        rows = {name: numbers[i * count :][:count] for i, name in enumerate(names)}
        for name in ("param", "update", "grad"):  # of sums of squares, the norms
            if name in rows:
                rows[name] = [math.sqrt(value) for value in rows[name]]
        return rows, numbers[len(names) * count :]

    def _look_for_events(self, step: int, view: StepView) -> None:
        norm = view.norm
        threshold = self._spikes.threshold(norm)
        if math.isfinite(norm) and threshold is None:
            self._quiet = view.grad
            return
        named = worst(self.source.names, view.grad)
        sizes = ", ".join(f"{name} {size:.4g}" for name, size in named)
        if not math.isfinite(norm):
            skips = self.source.native and getattr(self.source.optimizer, "nonfinite", "") == "skip"
            event = Event(step, "nonfinite", norm, None, "skipped" if skips else "applied", named)
            event.message = f"step {step}: the gradient norm is {norm} ({event.action}); worst: {sizes}"
        else:
            action = "clipped" if view.coefficient < 1 or min(view.factors) < 1 else "applied"
            event = Event(step, "spike", norm, threshold, action, named)
            event.message = (
                f"step {step}: the gradient norm is {norm:.4g}, above {threshold:.4g} ({action}); worst: {sizes}"
            )
        names = self.source.names
        where = self._explanations.get(step) or explain_by_norms(
            dict(zip(names, view.grad)), dict(zip(names, self._quiet)), self._spikes.factor
        )
        event.message += f". {where}" if where else ""
        self.events.append(event)
        if on_first_rank():
            _log.warning(event.message)
        for sink in self.sinks:
            sink.event(event)
