"""A step in two halves, as sharding does it, and the tensors that mixed precision hands to the engine."""

import math

import pytest
import torch

import gradfast

SHAPES = [(300,), (7, 5), (70_000,), ()]


def make_parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return parameters


def all_elements(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_two_halves_are_one_step_to_the_bit(norm_type):
    whole, halves = make_parameters(), make_parameters()
    expected = gradfast.AdamW(whole, lr=1e-2, max_norm=0.5, norm_type=norm_type)
    optimizer = gradfast.AdamW(halves, lr=1e-2, max_norm=0.5, norm_type=norm_type)
    optimizer._join_sums = lambda engine: engine.total_sum()
    for _ in range(3):
        expected.step()
        optimizer.step()
    assert torch.equal(all_elements(halves), all_elements(whole))
    assert optimizer.grad_norm == expected.grad_norm
    assert optimizer.clip_coef == expected.clip_coef


def test_the_given_total_decides_the_factor():
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = gradfast.SGD(parameters, lr=1.0, max_norm=0.5)
    # Three more processes with the same gradients: the norm is twice this one's.
    optimizer._join_sums = lambda engine: 4 * engine.total_sum()
    optimizer.step()
    own = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in parameters))
    assert optimizer.grad_norm.item() == pytest.approx(2 * own, rel=1e-14)
    factor = 0.5 / (2 * own + 1e-6)
    for parameter, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old - factor * parameter.grad, rtol=1e-14, atol=1e-15)


def test_member_sums_are_one_a_parameter_with_a_gradient():
    parameters = make_parameters()
    parameters[1].grad = None
    optimizer = gradfast.SGD(parameters, lr=1.0, norm_type=2.0)
    seen = []

    def join(engine):
        seen.extend(engine.member_sums())
        return engine.total_sum()

    optimizer._join_sums = join
    optimizer.step()
    ((indices, sums),) = seen
    assert indices == [0, 2, 3]
    expected = torch.stack([(parameters[i].grad ** 2).sum() for i in indices])
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)


def test_nonfinite_gradients_elsewhere_skip_the_step_here():
    parameters = make_parameters()
    before = all_elements(parameters).clone()
    optimizer = gradfast.SGD(parameters, lr=1.0, max_norm=1.0)
    optimizer._join_sums = lambda engine: engine.total_sum() + math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(all_elements(parameters), before)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10])
def test_gradients_carrying_a_loss_scale_give_the_step_without(loss_scale):
    plain, scaled = make_parameters(), make_parameters()
    for parameter in scaled:
        parameter.grad *= loss_scale
    expected = gradfast.AdamW(plain, lr=1e-2, max_norm=0.5)
    optimizer = gradfast.AdamW(scaled, lr=1e-2, max_norm=0.5)
    optimizer.grad_scale = torch.tensor([loss_scale])
    expected.step()
    optimizer.step()
    # A power of two changes no digit.
    assert torch.equal(all_elements(scaled), all_elements(plain))
    assert optimizer.grad_norm == expected.grad_norm


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_infinite_asks_to_skip(found, halves):
    parameters = make_parameters()
    before = all_elements(parameters).clone()
    optimizer = gradfast.SGD(parameters, lr=1.0, momentum=0.9)
    optimizer.found_inf = torch.tensor(found)
    optimizer._join_sums = (lambda engine: engine.total_sum()) if halves else None
    optimizer.step()
    assert optimizer.skipped_steps == int(found)
    assert torch.equal(all_elements(parameters), before) == bool(found)


def test_a_loss_scale_of_several_numbers_is_refused():
    optimizer = gradfast.SGD(make_parameters(), lr=1.0)
    optimizer.grad_scale = torch.ones(2)
    with pytest.raises(ValueError, match="loss_scale must hold one number"):
        optimizer.step()
