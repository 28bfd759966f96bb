"""A step in a profile: one named range, whatever the optimiser holds."""

from __future__ import annotations

import pytest
import torch

import gradfast


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
def test_a_step_is_one_range(name: str) -> None:
    """`gradfast::step` is made by record_function, which NVTX (`torch.autograd.profiler.emit_nvtx`) shows as well."""
    parameters = [torch.zeros(3, requires_grad=True) for _ in range(5)]
    optimizer = getattr(gradfast, name)([{"params": parameters[:2]}, {"params": parameters[2:]}], max_norm=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            optimizer.step()
    names = [event.name for event in profiler.events()]
    assert names.count("gradfast::step") == 3
    # Nothing else happens in a step: no operator of torch, which would be an allocation or a copy.
    assert [other for other in names if other.startswith("aten::")] == []


def test_the_functions_show_under_their_names() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        gradfast.clip_grad_norm_([parameter], 1.0)
    assert [event.name for event in profiler.events()].count("gradfast::clip_grad_norm_") == 1
