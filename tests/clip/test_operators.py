"""torch.ops.gradfast.*: what torch's machinery asks of operators, and torch.compile over the functions with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gradfast

GRADIENTS = [torch.randn(5), torch.randn(3, 2), torch.randn(70_001), torch.zeros(0), torch.randn(())]


def arguments_of(name: str, gradients: list[Tensor]) -> tuple:
    return {
        "total_norm": (gradients, 2.0),
        "power_sums": (gradients, 3.0),
        "clip_grad_norm_": (gradients, 0.1, 2.0),
        "clip_grads_with_norm_": (gradients, 0.1, torch.tensor(3.0)),
        "clip_grad_value_": (gradients, 0.1),
    }[name]


def operators() -> list[str]:
    """Every operator that the extension registers, so that a new one is checked or fails here."""
    schemas = torch._C._jit_get_all_schemas()
    return sorted(
        {schema.name.removeprefix("gradfast::") for schema in schemas if schema.name.startswith("gradfast::")}
    )


IN_PLACE = [name for name in operators() if name.endswith("_")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", operators())
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, fake kernel, autograd registration, and dispatch through AOT autograd with static and dynamic shapes."""
    gradients = [gradient.to(dtype) for gradient in GRADIENTS]
    torch.library.opcheck(getattr(torch.ops.gradfast, name).default, arguments_of(name, gradients))


def test_empty_lists() -> None:
    """Of no device, so that the dispatcher needs a kernel for none. (A fake tensor cannot be of no device.)"""
    assert torch.ops.gradfast.total_norm([], 2.0).item() == 0.0
    assert torch.ops.gradfast.clip_grad_norm_([], 1.0, 2.0).item() == 0.0
    assert torch.ops.gradfast.power_sums([], 2.0).shape == (0,)
    for name in IN_PLACE:
        getattr(torch.ops.gradfast, name)(*arguments_of(name, []))


def test_other_devices_are_refused_by_name() -> None:
    meta = torch.ops.gradfast.total_norm([torch.empty(3, device="meta")], 2.0)
    assert meta.device.type == "meta"
    with pytest.raises(NotImplementedError, match="sparse"):
        torch.ops.gradfast.total_norm([torch.zeros(3, 3).to_sparse()], 2.0)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators_bump_versions(name: str) -> None:
    gradients = [gradient.clone() for gradient in GRADIENTS]
    versions = [gradient._version for gradient in gradients]
    getattr(torch.ops.gradfast, name)(*arguments_of(name, gradients))
    assert all(gradient._version > version for gradient, version in zip(gradients, versions, strict=True))


@pytest.mark.parametrize("name", ["total_norm", "power_sums"])
def test_others_do_not(name: str) -> None:
    gradients = [gradient.clone() for gradient in GRADIENTS]
    getattr(torch.ops.gradfast, name)(*arguments_of(name, gradients))
    assert all(gradient._version == 0 for gradient in gradients)


def test_autograd_notices_a_clipped_tensor_that_it_saved() -> None:
    x = torch.ones(3, requires_grad=True)
    saved = x * 2
    loss = (saved**2).sum()  # keeps `saved` for its backward
    with torch.no_grad():
        torch.ops.gradfast.clip_grad_norm_([saved.detach()], 0.1, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.zeros(shape, requires_grad=True) for shape in ((4, 5), (7,), (70_001,))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [*made, torch.zeros(3, requires_grad=True)]  # one without a gradient


FUNCTIONS: dict[str, Callable[[list[Tensor]], Tensor | None]] = {
    "clip_grad_norm_": lambda p: gradfast.clip_grad_norm_(p, 1.0),
    "clip_grad_norm_ inf": lambda p: gradfast.clip_grad_norm_(p, 0.5, float("inf")),
    "clip_grad_value_": lambda p: gradfast.clip_grad_value_(p, 0.1),
    "clip_grads_with_norm_": lambda p: gradfast.clip_grads_with_norm_(p, 1.0, torch.tensor(4.0)),
    "get_total_norm": lambda p: gradfast.get_total_norm([x.grad for x in p if x.grad is not None]),
    "used further": lambda p: gradfast.clip_grad_norm_(p, 1.0) * 2 + p[0].grad.sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_into_one_graph(name: str) -> None:
    """`fullgraph=True` raises at a graph break. What it computes is what eager mode does, bit for bit."""
    torch._dynamo.reset()
    eager, compiled = parameters(), parameters()
    expected = FUNCTIONS[name](eager)
    found = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")(compiled)
    assert (found is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, other in zip(compiled, eager, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if other.grad is not None:
            assert torch.equal(mine.grad, other.grad)


def test_a_training_step_around_a_clip_has_no_graph_break() -> None:
    layer = torch.nn.Linear(8, 3)

    def step(x: Tensor) -> Tensor:
        loss = layer(x).square().sum()
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        return gradfast.get_total_norm(gradients)

    x = torch.randn(5, 8)
    torch._dynamo.reset()
    try:
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    except torch._dynamo.exc.Unsupported as reason:  # torch before 2.12 or so has no autograd.grad in a graph
        assert "autograd.grad" in str(reason)
        return
    torch.testing.assert_close(found, step(x), rtol=1e-6, atol=0)
