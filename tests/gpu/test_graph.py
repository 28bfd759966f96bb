"""A step captured in a CUDA graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu.oracle import random
from torch import Tensor

import gradfast

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one step. States and tables are made by one step before, on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def model(tensors: int, seed: int = 0) -> list[Tensor]:
    return random([(1 + 37 * (index % 50),) for index in range(tensors)], torch.float32, DEVICE, seed)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("tensors", [5, 161, 5000])  # 5000: the addresses are in device memory, not in the arguments
def test_replays_do_what_steps_do(name: str, tensors: int) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    ours, theirs = model(tensors), model(tensors)
    fast = getattr(gradfast, name)(ours, lr=torch.tensor(0.1, device=DEVICE), max_norm=1.0, **options)
    eager = getattr(gradfast, name)(theirs, lr=0.1, max_norm=1.0, **options)
    for mine, other in zip(ours, theirs):
        mine.grad, other.grad = torch.ones_like(mine), torch.ones_like(other)
    graph = captured(fast.step)
    eager.step()
    for step in range(4):
        rate = 0.1 / (step + 1)
        fast.param_groups[0]["lr"].fill_(rate)  # a replay reads the tensor anew
        eager.param_groups[0]["lr"] = rate
        for mine, other, gradient in zip(ours, theirs, model(tensors, seed=step + 1)):
            mine.grad.copy_(gradient)
            other.grad = gradient
        graph.replay()
        eager.step()
    for mine, other in zip(ours, theirs):
        # A rate of float32 and one of float64 differ in their 25th bit; four steps.
        torch.testing.assert_close(mine, other, rtol=2.0**-20, atol=1e-6)
    torch.testing.assert_close(fast.grad_norm, eager.grad_norm, rtol=0, atol=0)


@pytest.mark.parametrize("tensors", [5, 5000])
def test_steps_with_other_gradients_leave_a_graph_alone(tensors: int) -> None:
    """A graph reads the addresses that it captured, also after an eager step has written its own to the tables."""
    parameters = model(tensors)
    optimizer = gradfast.SGD(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    kept = [parameter.grad for parameter in parameters]
    graph = captured(optimizer.step)
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()  # eager: minus 2
    for gradient in kept:
        gradient.fill_(3.0)
    graph.replay()  # minus 3
    optimizer.step()  # minus 2
    graph.replay()  # minus 3
    for parameter, old in zip(parameters, before):
        torch.testing.assert_close(parameter, old - 10.0, rtol=0, atol=1e-5)


def test_nonfinite_steps_are_skipped_in_replays() -> None:
    parameters = model(10)
    optimizer = gradfast.AdamW(parameters, max_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    graph = captured(optimizer.step)
    graph.replay()
    before = [parameter.clone() for parameter in parameters]
    parameters[3].grad[0] = float("nan")
    graph.replay()
    graph.replay()
    for parameter, old in zip(parameters, before):
        assert torch.equal(parameter, old)
    assert optimizer.skipped_steps == 2
    parameters[3].grad[0] = 1.0
    graph.replay()
    assert optimizer.skipped_steps == 2
    assert not torch.equal(parameters[0], before[0])


def test_clip_functions_in_a_graph() -> None:
    gradient = torch.full((1000,), 2.0, device=DEVICE)
    parameter = torch.zeros_like(gradient)
    parameter.grad = gradient
    graph = captured(lambda: gradfast.clip_grad_norm_([parameter], 1.0))
    gradient.fill_(5.0)
    graph.replay()
    torch.testing.assert_close(gradient.norm(), torch.tensor(1.0, device=DEVICE), rtol=1e-5, atol=0)
