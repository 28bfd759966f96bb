"""The clip functions against float64 oracles and torch.nn.utils."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradfast

SHAPES = [(3, 4), (70_000,), (), (0,), (5, 2, 3)]


def with_gradients(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    parameters = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = (scale * torch.randn(parameter.shape, dtype=torch.float64)).to(dtype)
    return [*parameters, torch.zeros(2, requires_grad=True)]  # the last has no gradient


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("norm_type", [1.0, 1.5, 2.0, 4.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clip_grad_norm(dtype: torch.dtype, norm_type: float) -> None:
    parameters = with_gradients(dtype)
    before = flat(parameters)
    expected = torch.linalg.vector_norm(before, norm_type)
    norm = gradfast.clip_grad_norm_(parameters, 0.5, norm_type)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2.0**-23, atol=0)
    # Half a unit of the storage type from rounding the product, and the float32 factor's own rounding.
    rtol = {torch.float64: 1e-12, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    scaled = before * (0.5 / (expected + 1e-6))
    torch.testing.assert_close(flat(parameters), scaled, rtol=rtol, atol=2.0**-25 if dtype == torch.float16 else 1e-40)


def test_below_the_limit_nothing_changes() -> None:
    parameters = with_gradients(torch.float32)
    before = flat(parameters)
    gradfast.clip_grad_norm_(parameters, 1e9)
    assert torch.equal(flat(parameters), before)


def test_sum_of_many_squares_keeps_its_digits() -> None:
    """One flat tensor of 20 million: float32 sums lose digits here; the exact value is 0.1f * sqrt(n)."""
    tensor = torch.full((20_000_000,), 0.1)
    exact = tensor[0].double().item() * 20_000_000**0.5
    assert gradfast.get_total_norm(tensor).item() == pytest.approx(exact, rel=2.0**-23)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 2047, 2048, 2049, 4099, 131_072 + 2049])
def test_fp16_is_widened_in_blocks(length: int, bad: float | None) -> None:
    """Across blocks, vectors and their tails, with subnormal numbers, and with what is no number in the last place."""
    tensor = torch.randn(length).half()
    tensor[::3] *= 2.0**-16
    if bad is not None:
        tensor[-1] = bad
    for norm_type in (2.0, 1.0, float("inf")):
        exact = torch.linalg.vector_norm(tensor.double(), norm_type).float()
        found = gradfast.get_total_norm(tensor, norm_type)
        torch.testing.assert_close(found, exact, rtol=2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1e20, 1e-25, 3e-39])
def test_range_of_float32(value: float) -> None:
    tensor = torch.full((1000,), value)
    exact = tensor[0].double().item() * 1000**0.5
    assert gradfast.get_total_norm(tensor).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 65_536, 69_999])
def test_nonfinite_always_reaches_the_norm(norm_type: float, bad: float, place: int) -> None:
    tensor = torch.ones(70_000)
    tensor[place] = bad
    norm = gradfast.get_total_norm([torch.ones(3), tensor], norm_type).item()
    assert norm != norm if bad != bad else norm == bad


def test_error_if_nonfinite_comes_before_any_change() -> None:
    parameters = with_gradients(torch.float32)
    parameters[0].grad[0, 0] = float("nan")
    before = parameters[1].grad.clone()
    with pytest.raises(RuntimeError, match="nan"):
        gradfast.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert torch.equal(parameters[1].grad, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_clip_grad_value(dtype: torch.dtype) -> None:
    parameters = with_gradients(dtype, scale=3.0)
    parameters[1].grad[5] = float("nan")
    expected = flat(parameters).clamp(-0.5, 0.5)
    gradfast.clip_grad_value_(parameters, 0.5)
    torch.testing.assert_close(flat(parameters), expected, rtol=0, atol=0, equal_nan=True)


def test_clip_with_given_norm_and_versions() -> None:
    parameters = with_gradients(torch.float64)
    before, version = flat(parameters), parameters[0].grad._version
    gradfast.clip_grads_with_norm_(parameters, 1.0, torch.tensor(4.0))
    torch.testing.assert_close(flat(parameters), before / (4.0 + 1e-6), rtol=1e-14, atol=0)
    assert parameters[0].grad._version > version


def test_no_gradients_and_single_tensors() -> None:
    lonely = torch.zeros(2, requires_grad=True)
    assert gradfast.clip_grad_norm_(lonely, 1.0).item() == 0.0
    assert gradfast.get_total_norm([]).item() == 0.0
    gradfast.clip_grad_value_([], 1.0)
    assert gradfast.get_total_norm(torch.tensor([3.0, 4.0])).item() == 5.0
    assert gradfast.get_total_norm(torch.tensor([3.0, 4.0]) * 1j).item() == 5.0


def test_norm_type_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_type.*0\.5"):
        gradfast.get_total_norm([torch.ones(2)], 0.5)
