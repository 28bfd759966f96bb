"""What a step allocates: nothing that grows with the gradients, ever, and nothing at all from the second step on."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gradfast

ELEMENTS = 1_000_000
OPTIMIZERS = {
    "SGD": lambda parameters: gradfast.SGD(parameters, lr=0.1, momentum=0.9, max_norm=1.0),
    "AdamW": lambda parameters: gradfast.AdamW(parameters, lr=0.1, max_norm=1.0),
}


def allocations(function):
    """Bytes of each allocation that torch makes in `function`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as recorded:
        function()
    return [e.nbytes for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]


def test_the_probe_sees_an_allocation():
    assert max(size() for size in allocations(lambda: torch.empty(ELEMENTS))) == 4 * ELEMENTS


@pytest.mark.parametrize("layout", ["dense", "transposed gradient", "expanded gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_but_the_first_allocates(name, layout):
    parameter = torch.ones(1000, 1000, requires_grad=True)
    parameter.grad = {
        "dense": torch.ones(1000, 1000),
        "transposed gradient": torch.ones(1000, 1000).t(),
        "expanded gradient": torch.ones(1, 1000).expand(1000, 1000),
    }[layout]
    optimizer = OPTIMIZERS[name]([parameter])
    optimizer.step()
    assert allocations(optimizer.step) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_allocates_the_state_alone(name):
    parameter = torch.ones(ELEMENTS, requires_grad=True)
    parameter.grad = torch.ones(ELEMENTS)
    optimizer = OPTIMIZERS[name]([parameter])
    large = [size() for size in allocations(optimizer.step) if size() > 1000]
    assert large == [4 * ELEMENTS] * (1 if name == "SGD" else 2)


def test_a_step_shows_as_one_named_range():
    parameter = torch.ones(8, requires_grad=True)
    parameter.grad = torch.ones(8)
    optimizer = OPTIMIZERS["SGD"]([parameter])
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        optimizer.step()
    assert [event.name for event in recorded.events()] == ["gradfast::step"]
