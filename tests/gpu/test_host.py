"""What a step asks of the host: launches, waiting, streams."""

from __future__ import annotations

import time

import pytest
import torch
from gpu.host import no_synchronisation
from gpu.oracle import random
from torch import Tensor

import gradfast
from gradfast.bench.launches import launches_of
from gradfast.bench.memory import peak_extra_bytes

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")


def model(tensors: int, size: int = 512) -> list[Tensor]:
    parameters = random([(size,)] * tensors, torch.float32, DEVICE, seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
@pytest.mark.parametrize("tensors", [1, 161, 2000, 5000])
def test_one_launch_a_step(name: str, tensors: int) -> None:
    parameters = model(tensors)
    optimizer = getattr(gradfast, name)(parameters, max_norm=1.0)
    for _ in range(3):
        optimizer.step()
    assert len(launches_of(optimizer.step)) == 1
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)  # at other addresses
    assert len(launches_of(optimizer.step)) == 1


@pytest.mark.parametrize("norm_type", [1.0, float("inf")])
def test_two_launches_for_other_norms(norm_type: float) -> None:
    optimizer = gradfast.SGD(model(161), max_norm=1.0, norm_type=norm_type)
    optimizer.step()
    assert len(launches_of(optimizer.step)) == 2


def test_the_profiler_shows_one_range() -> None:
    optimizer = gradfast.SGD(model(10), max_norm=1.0)
    optimizer.step()
    with torch.profiler.profile() as profiler:
        optimizer.step()
    assert [event.name for event in profiler.events()].count("gradfast::step") >= 1


@pytest.mark.parametrize("tensors", [161, 2000, 5000])
def test_torch_sees_no_synchronisation(tensors: int) -> None:
    """From the first step on, which makes the states."""
    parameters = model(tensors)
    optimizer = gradfast.AdamW(parameters, lr=torch.tensor(1e-3, device=DEVICE), max_norm=1.0)
    with no_synchronisation():
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, step + 1.0)
            optimizer.step()
            _ = optimizer.grad_norm, optimizer.clip_coef, optimizer.grad_norms()
        gradfast.clip_grad_norm_(parameters, 1.0)


FORMATS = [{}, {"master_weights": True}, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}]


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, gradfast.GradScaler])
def test_no_synchronisation_under_a_scaler(kind: type[torch.amp.GradScaler], options: dict) -> None:
    parameters = random([(512,)] * 161, torch.float16, DEVICE, seed=0)
    optimizer = gradfast.AdamW(parameters, max_norm=1.0, **options)
    scaler = kind("cuda", init_scale=1024.0)
    scaler.scale(torch.ones(1, device=DEVICE))  # makes the scale
    with no_synchronisation():
        for step in range(5):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, float("inf") if step == 2 else step + 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 512.0
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("options", FORMATS[1:])
def test_one_launch_for_arrays_of_several_formats(options: dict) -> None:
    parameters = random([(512,)] * 161, torch.bfloat16, DEVICE, seed=0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW(parameters, max_norm=1.0, **options)
    optimizer.step()
    assert len(launches_of(optimizer.step)) == 1


@pytest.mark.parametrize("tensors", [161, 2000, 5000])
def test_the_host_does_not_wait_for_a_busy_device(tensors: int) -> None:
    """torch sees only the waits that it makes itself. Here the device is busy for half a second, and a step returns."""
    parameters = model(tensors)
    optimizer = gradfast.AdamW(parameters, max_norm=1.0)
    others = [torch.ones_like(parameter) for parameter in parameters]
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    start = time.perf_counter()
    optimizer.step()
    for parameter, gradient in zip(parameters, others):
        parameter.grad = gradient
    optimizer.step()
    _ = optimizer.grad_norm
    elapsed = time.perf_counter() - start
    still_busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert still_busy
    assert elapsed < 0.25


def test_nothing_of_the_gradients_size_is_allocated() -> None:
    optimizer = gradfast.AdamW(model(20, size=1_000_000), max_norm=1.0)
    optimizer.step()
    assert peak_extra_bytes(DEVICE, optimizer.step) < 100_000


def test_a_step_runs_on_the_current_stream() -> None:
    """The gradient is written late, on the same stream; a step on another stream would miss it."""
    parameter = torch.zeros(100_000, device=DEVICE)
    parameter.grad = torch.zeros_like(parameter)
    optimizer = gradfast.SGD([parameter], lr=1.0)
    optimizer.step()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        parameter.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            parameter.grad.fill_(3.0)
            optimizer.step()
            parameter.grad.fill_(100.0)
        torch.cuda.synchronize()
        assert bool((parameter == -3.0).all())


def test_two_optimisers_on_two_streams() -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    models = [model(300), model(300)]
    optimizers = [gradfast.SGD(parameters, lr=0.5, max_norm=10.0) for parameters in models]
    start = [[parameter.clone() for parameter in parameters] for parameters in models]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, optimizer in zip(streams, optimizers):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    norm = (300 * 512) ** 0.5
    moved = 20 * 0.5 * 10.0 / (norm + 1e-6)
    for parameters, before in zip(models, start):
        for parameter, old in zip(parameters, before):
            torch.testing.assert_close(parameter, old - moved, rtol=0, atol=20 * 2.0**-23)
