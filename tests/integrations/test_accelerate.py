"""Accelerate: clip_grad_norm_ done by the step, once, the norm handed out afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gradfast

accelerate = pytest.importorskip("accelerate")
from gradfast.integrations.accelerate import clip_in_step  # noqa: E402


@pytest.fixture
def accelerator() -> Iterator[object]:
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(accelerator: object, **options: object) -> tuple[Tensor, object]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = accelerator.prepare(gradfast.SGD([parameter], lr=1.0, **options))
    parameter.grad = torch.tensor([6.0, 8.0])
    return parameter, optimizer


@pytest.mark.parametrize(("value", "own", "limit"), [(5.0, None, 5.0), (5.0, 2.0, 2.0), (2.0, 5.0, 2.0)])
def test_clips_once_to_the_smaller_limit(accelerator: object, value: float, own: float | None, limit: float) -> None:
    parameter, optimizer = prepared(accelerator, max_norm=own)
    undo = clip_in_step(accelerator, optimizer)
    norm = accelerator.clip_grad_norm_([parameter], value)
    assert math.isnan(norm.item())
    assert parameter.grad.tolist() == [6.0, 8.0]
    optimizer.step()
    assert norm.item() == 10.0
    assert parameter.tolist() == pytest.approx([-6 * limit / 10, -8 * limit / 10], rel=1e-6)
    assert parameter.grad.tolist() == [6.0, 8.0]
    undo()
    assert optimizer.optimizer.max_norm == own
    accelerator.clip_grad_norm_([parameter], 5.0)
    assert parameter.grad.tolist() == pytest.approx([3.0, 4.0], rel=1e-6)


def test_infinity_measures_and_leaves_the_optimisers_own_limit(accelerator: object) -> None:
    """As the Trainer asks for the norm alone."""
    parameter, optimizer = prepared(accelerator, max_norm=5.0)
    clip_in_step(accelerator, optimizer)
    norm = accelerator.clip_grad_norm_([parameter], float("inf"))
    optimizer.step()
    assert norm.item() == 10.0
    assert parameter.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)


def test_other_parameters_are_clipped_by_accelerate(accelerator: object) -> None:
    parameter, optimizer = prepared(accelerator)
    clip_in_step(accelerator, optimizer)
    other = torch.zeros(1, requires_grad=True)
    other.grad = torch.full((1,), 50.0)
    assert accelerator.clip_grad_norm_([other], 5.0).item() == 50.0
    assert other.grad.item() == pytest.approx(5.0)
    optimizer.step()
    assert parameter.tolist() == [-6.0, -8.0]


def test_loss_scaling_clips_the_unscaled_norm(accelerator: object) -> None:
    """Under a GradScaler nobody unscales the gradients in memory: the step does."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(gradfast.SGD([parameter], lr=1.0), scaler=scaler)
    clip_in_step(accelerator, wrapped)
    scaler.scale((parameter * torch.tensor([6.0, 8.0])).sum()).backward()
    norm = accelerator.clip_grad_norm_([parameter], 5.0)
    wrapped.step()
    assert norm.item() == 10.0
    assert parameter.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)
    assert parameter.grad.tolist() == [6144.0, 8192.0]


def test_same_as_torch_over_steps_and_accumulation() -> None:
    """Clipped once an update, of what the micro-batches add up to."""

    def run(kind: type[torch.optim.Optimizer]) -> tuple[list[float], list[float]]:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1).double()
        model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
        if kind is gradfast.AdamW:
            clip_in_step(accelerator, optimizer)
        norms = []
        for batch in torch.randn(12, 5, 4, dtype=torch.float64):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).pow(2).mean())
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5) if accelerator.sync_gradients else None
                optimizer.step()
                optimizer.zero_grad()
                norms += [] if norm is None else [norm.item()]
        return [value for p in model.parameters() for value in p.flatten().tolist()], norms

    (ours, our_norms), (theirs, their_norms) = run(gradfast.AdamW), run(torch.optim.AdamW)
    assert len(our_norms) == 4
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert our_norms == pytest.approx(their_norms, rel=1e-6)  # handed out in float32


def test_refusals(accelerator: object) -> None:
    with pytest.raises(TypeError, match="from_torch"):
        clip_in_step(accelerator, torch.optim.SGD([torch.zeros(1)]))
    parameter, optimizer = prepared(accelerator, max_norm=5.0)
    clip_in_step(accelerator, optimizer)
    with pytest.raises(ValueError, match="only one of the two"):
        accelerator.clip_grad_norm_([parameter], 1.0, norm_type=1)


def test_example(example: object) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    loss, norm = example("accelerate_loop").main()
    assert loss < 1.0
    assert norm > 0
