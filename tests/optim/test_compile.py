"""torch.compile around a train step: one graph break for `step()`, nothing recompiled for another lr, same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gradfast

OPTIONS = {"SGD": {"momentum": 0.9, "max_norm": 0.5}, "Adam": {"max_norm": 0.5}, "AdamW": {"amsgrad": True}}


@pytest.fixture
def dynamo() -> Iterator[object]:
    """The compiler, counting from zero, for which recompiling is an error."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(error_on_recompile=True):
        yield counters
    dynamo.reset()


def make(name: str, lr: float | Tensor = 0.05) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    return model, getattr(gradfast, name)(model.parameters(), lr=lr, **OPTIONS[name])


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
    def train_step(inputs: Tensor) -> Tensor:
        loss = model(inputs).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss * 2

    return train_step


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_step_trains_alike_and_is_compiled_once(dynamo: dict, name: str, tensor_lr: bool) -> None:
    weights = []
    for compiled in (False, True):
        model, optimizer = make(name, torch.tensor(0.05) if tensor_lr else 0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        step = update(model, optimizer)
        step = torch.compile(step, backend="eager") if compiled else step
        for number in range(5):
            optimizer.zero_grad()
            step(torch.full((4, 3), 0.1 * (number + 1), dtype=torch.float64))
            schedule.step()
        weights.append([p.detach() for p in model.parameters()])
    for mine, other in zip(*weights, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
    breaks = [reason for reason in dynamo["graph_break"] if "backward" not in reason]
    assert len(breaks) == 1, breaks  # the break at backward() is there without gradfast
    assert "one native call" in breaks[0]


def test_step_alone_is_one_break_and_nothing_in_it_is_compiled(dynamo: dict) -> None:
    model, optimizer = make("Adam")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen: list = []
    optimizer.register_step_post_hook(lambda *_: seen.append(torch.compiler.is_compiling()))

    def around(x: Tensor) -> Tensor:
        x = x * 2
        optimizer.step()
        return x + 1

    compiled = torch.compile(around, backend="eager")
    for lr in (0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    assert seen == [False] * 3
    assert sum(dynamo["graph_break"].values()) == 1
    assert dynamo["stats"]["unique_graphs"] == 2  # before the step, and after


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_clip_functions_break_no_graph(dynamo: dict, backend: str) -> None:
    """They are operators with a shape function, and compile as one graph, with what is computed around them."""
    weights = [torch.zeros(2), torch.zeros(3)]

    def clipped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        weights[0].grad, weights[1].grad = a * 2, b + 0
        before = gradfast.clip_grad_norm_(weights, 1.0)
        gradfast.clip_grads_with_norm_(weights, 0.5, gradfast.get_total_norm([a * 2]) * 0 + 1)
        gradfast.clip_grad_value_(weights, 0.25)
        return before, weights[0].grad + weights[1].grad.sum()

    compiled = torch.compile(clipped, backend=backend, fullgraph=True)
    norm, left = compiled(torch.full((2,), 3.0), torch.zeros(3))
    assert norm.item() == pytest.approx(6 * 2**0.5)
    assert left.tolist() == pytest.approx([0.25, 0.25])  # 6 -> 1 / sqrt(2) -> half of that -> 1 / 4


def test_under_compiled_autograd(dynamo: dict) -> None:
    """The gradients are then written by a compiled graph, too; nothing that the step sees changes."""
    weights = []
    for compiled in (False, True):
        model, optimizer = make("AdamW")
        step = update(model, optimizer)
        with torch._dynamo.config.patch(compiled_autograd=compiled, error_on_recompile=False):
            step = torch.compile(step, backend="eager") if compiled else step
            for number in range(3):
                optimizer.zero_grad()
                step(torch.full((4, 3), 0.1 * (number + 1), dtype=torch.float64))
        weights.append([p.detach() for p in model.parameters()])
    for mine, other in zip(*weights, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
