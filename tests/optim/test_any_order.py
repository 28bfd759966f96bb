"""Anything that a program may do to an optimiser, in any order: gradfast and torch go on alike, in float64 to 1e-12.

A machine of Hypothesis draws sequences of events, up to fifty in one life of an optimiser, and does each to both of a
pair. Where they part, it shows the shortest program that parts them. `--hypothesis-profile explore` draws new ones.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import gradfast

SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3,), (2, 3), (4, 3, 2, 2), (17,)]
NAMES = ["SGD", "Adam", "AdamW"]


def with_dimensions_reversed(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t.clone(memory_format=torch.contiguous_format),
    "backwards": lambda t: with_dimensions_reversed(with_dimensions_reversed(t).contiguous()),
    "gapped": lambda t: torch.stack([t, torch.full_like(t, 7.0)], dim=-1)[..., 0],
}


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def rates() -> st.SearchStrategy[Any]:
    return st.sampled_from([0.05, 0.0, 0.3, 1, double(0.1), double(0.02).reshape(1)])


def betas() -> st.SearchStrategy[Any]:
    return st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.95, 0.9), (double(0.8), double(0.95))])


def choices(name: str) -> dict[str, st.SearchStrategy[Any]]:
    """What may stand in a group, and be changed there between steps."""
    common = {
        "lr": rates(),
        "weight_decay": st.sampled_from([0, 0.01, 0.3]),
        "maximize": st.booleans(),
    }
    if name == "SGD":
        return {
            **common,
            "momentum": st.sampled_from([0, 0.5, 0.9, 1]),
            "dampening": st.sampled_from([0, 0.3, 1]),
            "nesterov": st.booleans(),
        }
    return {**common, "betas": betas(), "eps": st.sampled_from([1e-8, 1e-3, 1]), "amsgrad": st.booleans()}


@st.composite
def options(draw: st.DrawFn, name: str) -> dict[str, Any]:
    drawn = {key: draw(values) for key, values in choices(name).items() if draw(st.booleans())}
    if drawn.get("nesterov"):  # torch takes it only so
        drawn |= {"momentum": drawn.get("momentum") or 0.9, "dampening": 0}
    return drawn


class AnyOrder(RuleBasedStateMachine):
    """An optimiser of gradfast and torch's plain one, with copies of the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.name = ""
        self.moved = True  # something happened since the pair was compared

    # ---------------------------------------------------------------- how a life begins

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        draw = data.draw
        self.name = draw(st.sampled_from(NAMES))
        self.max_norm = draw(st.sampled_from([None, None, 1.0]))
        self.nonfinite = draw(st.sampled_from(["skip", "propagate"]))
        mine, theirs = [], []
        for _ in range(draw(st.integers(1, 3))):
            ours, others = self.new_parameters(draw)
            own = draw(options(self.name))
            mine.append({"params": ours, **copy.deepcopy(own)})
            theirs.append({"params": others, **copy.deepcopy(own)})
        self.given = draw(options(self.name))
        self.fast, self.oracle = self.make(gradfast, mine), self.make(torch.optim, theirs)

    def new_parameters(self, draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
        mine = []
        for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)):
            dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.complex128]))
            layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
            mine.append(layout(self.random(shape, dtype)).requires_grad_())
        return mine, [p.detach().contiguous().clone().requires_grad_() for p in mine]

    def random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype)

    def make(self, library: Any, groups: Any) -> torch.optim.Optimizer:
        own = {"max_norm": self.max_norm, "nonfinite": self.nonfinite} if library is gradfast else {"foreach": False}
        return getattr(library, self.name)(groups, **own, **copy.deepcopy(self.given))

    @property
    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.fast, self.oracle

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.fast.param_groups, self.oracle.param_groups, strict=True)
        return [pair for mine, other in groups for pair in zip(mine["params"], other["params"], strict=True)]

    def pair(self, draw: st.DrawFn) -> tuple[Tensor, Tensor]:
        return draw(st.sampled_from(self.pairs()))

    # ---------------------------------------------------------------- steps

    def step_torch(self) -> None:
        """Clip and step as one did before gradfast; a step that is to be skipped is not done at all."""
        gradients = [other.grad for _, other in self.pairs() if other.grad is not None]
        bad = not all(bool(torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all()) for g in gradients)
        if bad and self.nonfinite == "skip":
            return
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_([other for _, other in self.pairs()], self.max_norm)
        self.oracle.step()

    @rule(data=st.data(), steps=st.integers(1, 3), some=st.booleans())
    def step(self, data: st.DataObject, steps: int, some: bool) -> None:
        for _ in range(steps):
            for mine, other in self.pairs():
                gradient = self.random(tuple(mine.shape), mine.dtype)
                layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
                missing = some and data.draw(st.booleans())
                mine.grad = None if missing else layout(gradient)
                other.grad = None if missing else gradient
            self.fast.step()
            self.step_torch()
        self.moved = True

    @rule(data=st.data(), bad=st.sampled_from([math.nan, math.inf]))
    def step_with_a_bad_gradient(self, data: st.DataObject, bad: float) -> None:
        if self.nonfinite == "propagate":  # and the pair is of no further use
            return
        for pair in self.pairs():
            for each in pair:
                each.grad = torch.ones_like(each)
        for each in self.pair(data.draw):
            each.grad.fill_(bad)
        self.fast.step()
        self.step_torch()
        self.moved = True

    @rule()
    def step_by_a_closure(self) -> None:
        def closure_of(position: int) -> Callable[[], Tensor]:
            def closure() -> Tensor:
                self.both[position].zero_grad()
                parameters = [pair[position] for pair in self.pairs() if pair[position].requires_grad]
                loss = sum((((p - 0.5).abs() ** 2).sum() for p in parameters), torch.zeros(()))
                if parameters:
                    loss.backward()
                return loss

            return closure

        losses = [self.fast.step(closure_of(0)), closure_of(1)()]
        self.step_torch()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12, equal_nan=True)
        self.moved = True

    @rule(to_none=st.booleans(), step=st.booleans())
    def zero_gradients(self, to_none: bool, step: bool) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none=to_none)
        if step:
            self.fast.step()
            self.step_torch()
            self.moved = True

    # ---------------------------------------------------------------- what stands in groups

    @rule(data=st.data())
    def change_an_option(self, data: st.DataObject) -> None:
        known = choices(self.name)
        known.pop("amsgrad", None)  # torch fails where the maximum was never kept
        key = data.draw(st.sampled_from(sorted(known)))
        value = data.draw(known[key])
        number = data.draw(st.integers(0, len(self.fast.param_groups) - 1))
        for optimizer in self.both:
            optimizer.param_groups[number][key] = copy.deepcopy(value)

    @rule(factor=st.sampled_from([0.5, 0.9]))
    def write_into_rates(self, factor: float) -> None:
        for optimizer in self.both:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(factor)
                else:
                    group["lr"] *= factor

    @rule(steps=st.integers(1, 4))
    def follow_a_schedule(self, steps: int) -> None:
        schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in self.both]
        for _ in range(steps):
            for mine, other in self.pairs():
                other.grad = self.random(tuple(mine.shape), mine.dtype)
                mine.grad = other.grad.clone()
            self.fast.step()
            self.step_torch()
            for schedule in schedules:
                schedule.step()
        for optimizer in self.both:
            for group in optimizer.param_groups:
                del group["initial_lr"]
        self.moved = True

    @precondition(lambda self: self.name and len(self.fast.param_groups) < 5)
    @rule(data=st.data())
    def add_a_group(self, data: st.DataObject) -> None:
        own = data.draw(options(self.name))
        for optimizer, parameters in zip(self.both, self.new_parameters(data.draw), strict=True):
            optimizer.add_param_group({"params": parameters, **copy.deepcopy(own)})

    @rule(data=st.data())
    def move_a_parameter_to_another_group(self, data: st.DataObject) -> None:
        source, target = (data.draw(st.integers(0, len(self.fast.param_groups) - 1)) for _ in range(2))
        if len(self.fast.param_groups[source]["params"]) > 1:
            same = self.fast.param_groups[source].get("amsgrad") == self.fast.param_groups[target].get("amsgrad")
            for optimizer in self.both if same else ():
                optimizer.param_groups[target]["params"].append(optimizer.param_groups[source]["params"].pop())

    @precondition(lambda self: self.name and len(self.fast.param_groups) > 1)
    @rule()
    def drop_the_last_group(self) -> None:
        for optimizer in self.both:
            for parameter in optimizer.param_groups.pop()["params"]:
                optimizer.state.pop(parameter, None)

    # ---------------------------------------------------------------- what happens to parameters and states

    @rule(data=st.data())
    def freeze_or_unfreeze(self, data: st.DataObject) -> None:
        for each in self.pair(data.draw):
            each.requires_grad_(not each.requires_grad)

    @rule(data=st.data(), layout=st.sampled_from(list(LAYOUTS)))
    def lay_out_anew(self, data: st.DataObject, layout: str) -> None:
        mine, _ = self.pair(data.draw)
        mine.data = LAYOUTS[layout](mine.data)
        mine.grad = None if mine.grad is None else LAYOUTS[layout](mine.grad)

    @rule(data=st.data())
    def write_into_a_parameter(self, data: st.DataObject) -> None:
        for each in self.pair(data.draw):
            with torch.no_grad():
                each.mul_(0.5).add_(0.25)
        self.moved = True

    @rule(data=st.data())
    def forget_a_state(self, data: st.DataObject) -> None:
        for optimizer, parameter in zip(self.both, self.pair(data.draw), strict=True):
            optimizer.state.pop(parameter, None)

    @rule()
    def forget_all_states(self) -> None:
        for optimizer in self.both:
            optimizer.state.clear()

    @rule(factor=st.sampled_from([0.0, 0.5]))
    def scale_all_states(self, factor: float) -> None:
        for optimizer in self.both:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor) and key != "step":
                        value.mul_(factor)

    @rule()
    def exchange_states_for_copies(self) -> None:
        for optimizer in self.both:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = value.clone()

    # ---------------------------------------------------------------- copies and checkpoints

    @rule(how=st.sampled_from([copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]))
    def become_a_copy(self, how: Callable[[Any], Any]) -> None:
        self.fast, self.oracle = how(self.fast), how(self.oracle)

    @rule(saved_by=st.sampled_from([0, 1]), loaded_by=st.sampled_from([0, 1]), anew=st.booleans())
    def load_a_checkpoint(self, saved_by: int, loaded_by: int, anew: bool) -> None:
        """What one saved, the other or the same loads, or a new one of its kind."""
        file = io.BytesIO()
        torch.save(self.both[saved_by].state_dict(), file)
        file.seek(0)
        optimizers = list(self.both)
        if anew:
            groups = [{"params": group["params"]} for group in optimizers[loaded_by].param_groups]
            optimizers[loaded_by] = self.make([gradfast, torch.optim][loaded_by], groups)
        optimizers[loaded_by].load_state_dict(torch.load(file, weights_only=True))
        self.fast, self.oracle = optimizers
        for group in self.oracle.param_groups:
            group["foreach"] = False

    @rule()
    def convert_from_torch(self) -> None:
        """A copy of torch's takes the place of ours."""
        self.fast = gradfast.from_torch(copy.deepcopy(self.oracle), max_norm=self.max_norm, nonfinite=self.nonfinite)

    # ---------------------------------------------------------------- what always holds

    @invariant()
    def the_pair_agrees(self) -> None:
        if not self.name or not self.moved:
            return
        self.moved = False
        close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
        for mine, other in self.pairs():
            torch.testing.assert_close(mine, other, **close)
            for key, value in self.oracle.state.get(other, {}).items():
                if value is not None:
                    torch.testing.assert_close(self.fast.state[mine][key], value, check_dtype=False, **close)


def test_whatever_happens_the_pair_agrees() -> None:
    many = settings(max_examples=100, stateful_step_count=50, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(AnyOrder, settings=many)
