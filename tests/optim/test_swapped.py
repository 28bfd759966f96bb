"""Parameters, states and groups that change under the optimiser: seen at the next step, or refused unharmed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import gradfast


def stepped(name: str = "SGD", size: int = 4, **options: object) -> tuple[Tensor, torch.optim.Optimizer]:
    """A parameter of ones, as "layer.weight", that has had one step with gradients of one."""
    parameter = torch.nn.Parameter(torch.ones(size))
    optimizer = getattr(gradfast, name)([("layer.weight", parameter)], lr=0.1, **options)
    parameter.grad = torch.ones(size)
    optimizer.step()
    return parameter, optimizer


def give(parameter: Tensor, data: Tensor) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = torch.ones_like(data)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.ones(4000), ValueError, r"layer\.weight.*\[4\].*\[4000\]"),
        (torch.ones(4, dtype=torch.float64), TypeError, r"layer\.weight.*Float.*Double"),
        (torch.ones(1).expand(4), RuntimeError, r"layer\.weight.*clone"),
    ],
)
def test_parameter_with_other_data_than_its_state_is_refused(
    data: Tensor, error: type[Exception], message: str
) -> None:
    parameter, optimizer = stepped(momentum=0.9)
    before = parameter.detach().clone()
    give(parameter, data)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones_like(data))
    give(parameter, before)
    optimizer.step()  # and the optimiser is as good as before
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.9 - 0.1 * 1.9))


def test_state_resized_in_place_is_refused() -> None:
    parameter, optimizer = stepped("Adam", size=1000)
    optimizer.state[parameter]["exp_avg_sq"].resize_(2)
    with pytest.raises(ValueError, match=r"exp_avg_sq.*layer\.weight.*\[2\].*\[1000\]"):
        optimizer.step()


def test_parameter_with_other_data_of_its_kind_is_stepped() -> None:
    parameter, optimizer = stepped()
    first = parameter.data
    give(parameter, torch.zeros(4))
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((4,), -0.1))
    assert torch.equal(first, torch.full((4,), 0.9))


def test_parameter_replaced_in_its_group_is_stepped() -> None:
    """As torch.optim does, which reads the group at every step."""
    parameter, optimizer = stepped(momentum=0.9)
    other = torch.nn.Parameter(torch.zeros(4))
    optimizer.param_groups[0]["params"][0] = other
    other.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(other.detach(), torch.full((4,), -0.1))
    assert torch.equal(parameter.detach(), torch.full((4,), 0.9))
    assert optimizer.skipped_steps == 0


def test_parameter_moved_between_groups_takes_the_settings_of_the_new_one() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = gradfast.SGD([{"params": [a, b]}, {"params": [torch.zeros(1)], "lr": 10.0}], lr=1.0)
    a.grad = b.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    optimizer.step()
    assert (a.item(), b.item()) == (-2.0, -11.0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copy_after_a_skipped_first_step_starts_momentum_afresh(clone: object) -> None:
    """Dampening leaves the first step undamped; a buffer made by a skipped step must not count as the first."""
    parameter = torch.zeros(2)
    optimizer = gradfast.SGD([parameter], lr=1.0, momentum=0.9, dampening=0.5)
    parameter.grad = torch.tensor([float("nan"), 1.0])
    optimizer.step()
    twin = clone(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.ones(2)
    twin.step()
    assert twin.param_groups[0]["params"][0].tolist() == [-1.0, -1.0]
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [-1.0, -1.0]
    assert optimizer.skipped_steps == 1


def test_small_beta1_keeps_the_gradients_digits() -> None:
    """beta1 = 0, as in many GANs: after a gradient of 1e8 the next one, 1, is not lost in the difference of the two."""
    parameter = torch.zeros(1)
    optimizer = gradfast.Adam([parameter], lr=0.1, betas=(0.0, 0.9))
    for value in (1e8, 1.0):
        parameter.grad = torch.tensor([value])
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].item() == 1.0


@pytest.mark.parametrize("keep", [lambda o: o.state_dict(), copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_parameter_taken_out_before_its_first_update_leaves_no_state_behind(keep: object) -> None:
    """torch finds no number in the groups for a state of a parameter that is in none, and saves nothing at all."""
    kept, gone = torch.ones(2), torch.ones(2)
    optimizer = gradfast.SGD([{"params": [kept]}, {"params": [gone]}], momentum=0.9, dampening=0.1)
    for change in (lambda: None, lambda: optimizer.state.pop(optimizer.param_groups.pop()["params"][0])):
        change()
        kept.grad, gone.grad = torch.full((2,), float("nan")), torch.ones(2)
        optimizer.step()
        keep(optimizer)
    optimizer.state.clear()
    keep(optimizer)
    assert gone not in optimizer.state
