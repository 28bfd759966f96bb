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


def test_clip_functions_break_no_graph(dynamo: dict) -> None:
    """They are operators with a shape function: one graph, no break."""

    def clipped(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.gradfast.total_norm([a * 2, b], 2.0) + 1

    compiled = torch.compile(clipped, backend="aot_eager", fullgraph=True)
    assert compiled(torch.full((2,), 3.0), torch.zeros(3)).item() == pytest.approx(1 + 6 * 2**0.5)
