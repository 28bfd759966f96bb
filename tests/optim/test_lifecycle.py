"""What surrounds the step: hooks, closures, copies, repr, defaults, state keys."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optim.pairs import Twins
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

import gradfast

NAMES = ["SGD", "Adam", "AdamW"]
OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.1}, "Adam": {"amsgrad": True}, "AdamW": {}}


@pytest.fixture
def parameter() -> Tensor:
    return torch.ones(2, requires_grad=True)


def test_hooks_run_in_torchs_order_with_torchs_arguments(parameter: Tensor) -> None:
    def events(module: object) -> list:
        seen: list = []

        def hook(name: str) -> object:
            return lambda o, a, k: seen.append((name, type(o).__name__, len(a), sorted(k), torch.is_grad_enabled()))

        handles = [
            torch_optimizer.register_optimizer_step_pre_hook(hook("global before")),
            torch_optimizer.register_optimizer_step_post_hook(hook("global after")),
        ]
        optimizer = module.SGD([parameter], lr=0.1)
        handles.append(optimizer.register_step_post_hook(hook("own after")))
        handles.append(optimizer.register_step_pre_hook(hook("own before")))
        try:
            optimizer.step()
            optimizer.step(lambda: seen.append(("closure", torch.is_grad_enabled())))
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return seen

    assert events(gradfast) == events(torch.optim)


def test_hook_may_replace_the_closure_and_is_refused_other_answers(parameter: Tensor) -> None:
    for module in (torch.optim, gradfast):
        optimizer = module.SGD([parameter], lr=0.1)
        handle = optimizer.register_step_pre_hook(lambda o, a, k: ((a[0], lambda: 7.0), k))
        assert optimizer.step(lambda: 3.0) == 7.0
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, a, k: 5)
        with pytest.raises(RuntimeError, match="new_args, new_kwargs"):
            optimizer.step()


def test_hook_that_differentiates(parameter: Tensor) -> None:
    """A pre-hook may run a backward pass of its own: gradients are enabled in it."""
    optimizer = gradfast.SGD([parameter], lr=0.5)

    def penalise(*_: object) -> None:
        (parameter**2).sum().backward()

    optimizer.register_step_pre_hook(penalise)
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_closure_equals_torch(name: str) -> None:
    twins = Twins(name, lr=0.1)

    def closure(optimizer: torch.optim.Optimizer) -> object:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for group in optimizer.param_groups for p in group["params"])
            loss.backward()
            return loss

        return evaluate

    for _ in range(5):
        losses = [optimizer.step(closure(optimizer)).item() for optimizer in twins.optimizers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert twins.fast.step(closure=closure(twins.fast)) is not None
    twins.oracle.step(closure=closure(twins.oracle))
    twins.check()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_go_on_as_torch(name: str, steps: int) -> None:
    for clone in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        twins = Twins(name, lr=0.1, **OPTIONS[name])
        twins.step(steps)
        twins.fast, twins.oracle = clone(twins.fast), clone(twins.oracle)
        twins.step(3)
        twins.check()


@pytest.mark.parametrize("name", NAMES)
def test_copies_keep_the_clipping(name: str) -> None:
    optimizer = getattr(gradfast, name)([torch.ones(1)], max_norm=0.5, norm_type=3, nonfinite="raise", l1=0.01)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (clone.max_norm, clone.norm_type, clone.nonfinite) == (0.5, 3.0, "raise")
        assert clone.param_groups[0]["l1"] == 0.01


@pytest.mark.parametrize("name", NAMES)
def test_subclass_is_an_optimiser_of_its_own(name: str) -> None:
    """A user's subclass with its own step, as schedulers and launchers wrap it, still steps."""

    class Mine(getattr(gradfast, name)):
        def step(self, closure: object = None) -> object:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    parameter = torch.ones(3)
    parameter.grad = torch.ones(3)
    optimizer = Mine([parameter], lr=0.1)
    seen: list = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    assert optimizer.calls == 1
    assert seen
    assert parameter[0] < 1


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_repr_extend_torchs(name: str) -> None:
    ours, theirs = (getattr(m, name)([torch.ones(1)], lr=0.5, **OPTIONS[name]) for m in (gradfast, torch.optim))
    assert theirs.defaults.items() <= ours.defaults.items()
    assert {k: v for k, v in theirs.param_groups[0].items() if k != "params"}.items() <= ours.param_groups[0].items()
    lines = [line for line in repr(theirs).splitlines() if line != ")"]
    assert set(lines) <= set(repr(ours).splitlines())
    assert "max_norm=2.0" in repr(getattr(gradfast, name)([torch.ones(1)], max_norm=2.0))


@pytest.mark.parametrize("name", NAMES)
def test_state_keys_are_torchs(name: str) -> None:
    twins = Twins(name, groups=[([(3,), (2,)], {})], lr=0.1, **OPTIONS[name])
    twins.step(without=(1,))
    mine, other = twins.pairs()[0]
    assert list(twins.fast.state[mine]) == list(twins.oracle.state[other])
    assert not twins.fast.state.get(twins.pairs()[1][0])


@pytest.mark.parametrize("name", NAMES)
def test_profiler_sees_the_step(name: str, parameter: Tensor) -> None:
    optimizer = getattr(gradfast, name)([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "gradfast::step" in {event.key for event in profile.key_averages()}
