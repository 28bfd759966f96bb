"""GradScalers with gradfast's optimisers against torch's reference step: parameters, states, scales, skipped steps."""

from __future__ import annotations

import copy
import logging
import pickle
import random

import pytest
import torch
from amp.scaled import BAD_FROM_THE_START, GROWS_AND_BACKS_OFF, give_gradients, parameters, scaler_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradfast

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
]
SCALERS = [torch.amp.GradScaler, gradfast.GradScaler]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    # torch unscales into the gradient and clips it in place: two roundings of float32 that the one pass does not make.
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize("events", [GROWS_AND_BACKS_OFF, BAD_FROM_THE_START])
@pytest.mark.parametrize("unscaled_first", [False, True])
@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_same_parameters_states_and_scales_as_torch(
    name: str, options: dict, kind: type, unscaled_first: bool, events: list[str]
) -> None:
    """The oracle unscales, clips and steps with torch's single-tensor optimiser, which no skipped step reaches."""
    ours, theirs = parameters(), parameters()
    fast = getattr(gradfast, name)(ours, max_norm=1.0, **options)
    oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
    scaler, reference = scaler_of(kind), scaler_of(torch.amp.GradScaler)
    for step, event in enumerate(events):
        give_gradients(ours, step, scaler.get_scale(), event)
        give_gradients(theirs, step, reference.get_scale(), event)
        if unscaled_first:
            scaler.unscale_(fast)
        reference.unscale_(oracle)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        scaler.step(fast)
        reference.step(oracle)
        scaler.update()
        reference.update()
        assert scaler.state_dict() == reference.state_dict(), step
        assert_same(ours, theirs)
        torch.testing.assert_close(fast.grad_norm, norm, rtol=2.0**-20, atol=0, equal_nan=True)
        for mine, other in zip(ours, theirs, strict=True):
            for key, value in oracle.state.get(other, {}).items():
                if value is not None:
                    torch.testing.assert_close(fast.state[mine][key], value, rtol=2.0**-18, atol=2.0**-20)
    assert fast.skipped_steps == sum(event != "ok" for event in events)


@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[1:])
def test_same_scales_over_hundreds_of_steps_with_random_infinities(name: str, options: dict, kind: type) -> None:
    """The scale grows and backs off as torch's, whether `unscale_` was called before or not."""
    chance = random.Random(3)
    ours, theirs = parameters()[:3], parameters()[:3]
    fast = getattr(gradfast, name)(ours, max_norm=1.0, **options)
    oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
    scaler, reference = scaler_of(kind, growth_interval=5), scaler_of(torch.amp.GradScaler, growth_interval=5)
    events = [chance.choice(["inf", "nan"]) if chance.random() < 0.15 else "ok" for _ in range(300)]
    for step, event in enumerate(events):
        give_gradients(ours, step, scaler.get_scale(), event)
        give_gradients(theirs, step, reference.get_scale(), event)
        if chance.random() < 0.3:
            scaler.unscale_(fast)
        reference.unscale_(oracle)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for each, optimizer in ((scaler, fast), (reference, oracle)):
            each.step(optimizer)
            each.update()
        assert scaler.state_dict() == reference.state_dict(), step
    assert fast.skipped_steps == 300 - events.count("ok") > 20
    for mine, other in zip(ours, theirs, strict=True):  # a rounding of each of hundreds of steps
        torch.testing.assert_close(mine, other, rtol=2.0**-16, atol=2.0**-16)


@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_are_unscaled_in_float32(dtype: torch.dtype, kind: type) -> None:
    """torch refuses to unscale fp16 gradients in place, where small ones would vanish: 2^-24 / 1024 is no fp16."""
    parameter = torch.zeros(3, dtype=dtype)
    parameter.grad = torch.full((3,), 2.0**-24, dtype=dtype)
    optimizer = gradfast.SGD([parameter], lr=2.0**20)
    scaler = scaler_of(kind)
    scaler.step(optimizer)
    assert parameter.tolist() == [-(2.0**-14)] * 3
    assert optimizer.grad_norm.item() == pytest.approx(3**0.5 * 2.0**-34, rel=1e-6)
    assert optimizer.grad_norms()["param_groups[0]['params'][0]"].item() == pytest.approx(3**0.5 * 2.0**-34, rel=1e-6)


@pytest.mark.parametrize("kind", SCALERS)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate", "raise"])
def test_under_a_scaler_a_bad_step_is_skipped_whatever_nonfinite_says(
    nonfinite: str, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    named = [(f"layer{i}", p) for i, p in enumerate(parameters())]
    optimizer = gradfast.AdamW(named, lr=0.1, nonfinite=nonfinite)
    ours = [p for _, p in named]
    scaler = scaler_of(kind)
    give_gradients(ours, 0, 1024.0, "ok")
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy(([p.detach().clone() for p in ours], optimizer.state_dict()["state"]))
    give_gradients(ours, 1, 1024.0, "inf")
    with caplog.at_level(logging.INFO, logger="gradfast"):
        scaler.step(optimizer)
    scaler.update()
    after = ([p.detach() for p in ours], optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert scaler.get_scale() == 256.0
    assert optimizer.skipped_steps == 1
    assert optimizer.nonfinite_parameter == "layer1"
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_torch_fused_sgd_keeps_garbage_momentum_where_ours_starts_afresh() -> None:
    """After a skipped first step, torch's fused momentum is whatever `empty_like` returned; ours is the gradient."""
    results = {}
    for name, make in (("torch", torch.optim.SGD), ("gradfast", gradfast.SGD)):
        parameter = torch.zeros(4096)
        extra = {"fused": True} if name == "torch" else {}
        optimizer = make([parameter], lr=1.0, momentum=0.9, **extra)
        scaler = scaler_of(torch.amp.GradScaler)
        # empty_like is made to return what memory may hold, so that the test does not depend on the allocator.
        fill = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            for value in (float("inf"), 1024.0):
                parameter.grad = torch.full((4096,), value)
                scaler.step(optimizer)
                scaler.update(1024.0)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = fill
        results[name] = parameter[0].item()
    assert results["gradfast"] == -1.0
    if results["torch"] == results["torch"]:
        pytest.skip(f"torch {torch.__version__} has this mended: momentum after a skipped first step of fused SGD")


def test_torch_fused_sgd_fails_for_a_late_first_gradient_where_ours_goes_on() -> None:
    def train(optimizer: torch.optim.Optimizer, first: Tensor, second: Tensor) -> None:
        scaler = scaler_of(torch.amp.GradScaler)
        for step in range(3):
            first.grad = torch.full((3,), 1024.0)
            second.grad = torch.full((2,), 2048.0) if step > 0 else None
            scaler.step(optimizer)
            scaler.update(1024.0)

    first, second = torch.zeros(3), torch.zeros(2)
    train(gradfast.SGD([first, second], lr=1.0, momentum=0.5), first, second)
    assert first.tolist() == [-(1 + 1.5 + 1.75)] * 3
    assert second.tolist() == [-(2 + 3.0)] * 2
    first, second = torch.zeros(3), torch.zeros(2)
    try:
        train(torch.optim.SGD([first, second], lr=1.0, momentum=0.5, fused=True), first, second)
    except TypeError:
        return
    pytest.skip(f"torch {torch.__version__} has this mended: a first gradient that comes late to fused SGD")


@pytest.mark.parametrize("kind", SCALERS)
def test_several_optimizers_on_one_scaler(kind: type) -> None:
    """Each skips by its own gradients; one bad one lowers the scale for all. One of them is torch's."""
    for bad in range(3):
        ours = [torch.zeros(5) for _ in range(3)]
        optimizers = [
            gradfast.SGD([ours[0]], lr=1.0),
            torch.optim.SGD([ours[1]], lr=1.0),
            gradfast.Adam([ours[2]], lr=1.0),
        ]
        scaler = scaler_of(kind)
        for index, parameter in enumerate(ours):
            parameter.grad = torch.full((5,), 1024.0)
            if index == bad:
                parameter.grad[3] = float("inf")
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 256.0
        for index, parameter in enumerate(ours):
            expected = 0.0 if index == bad else -1.0
            torch.testing.assert_close(parameter, torch.full((5,), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SCALERS)
def test_accumulated_gradients(kind: type) -> None:
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = gradfast.SGD([weight], lr=0.5, max_norm=1.0)
    scaler = scaler_of(kind)
    for batch in (torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])):
        scaler.scale((weight * batch).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.grad_norm.item() == 5.0
    assert weight.tolist() == pytest.approx([1 - 0.3, -2 - 0.4], abs=1e-6)
    assert weight.grad.tolist() == [3072.0, 4096.0]  # as backward wrote it


@pytest.mark.parametrize("kind", SCALERS)
def test_closures(kind: type) -> None:
    """As torch: refused by keyword; by position it is the caller's to scale the loss. What it leaves is what counts."""
    weight = torch.zeros(2, requires_grad=True)
    optimizer = gradfast.SGD([weight], lr=1.0)
    scaler = scaler_of(kind)
    weight.grad = torch.ones(2)

    def closure() -> Tensor:
        weight.grad = torch.full((2,), 1024.0)
        return torch.tensor(7.0)

    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=closure)
    assert scaler.step(optimizer, closure).item() == 7.0
    assert weight.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("kind", SCALERS)
def test_order_of_calls_is_checked_as_by_torch(kind: type) -> None:
    (parameter,) = [torch.zeros(2)]
    parameter.grad = torch.ones(2)
    optimizer = gradfast.SGD([parameter], lr=1.0)
    scaler = scaler_of(kind)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()
    parameter.grad = None
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


def test_grad_scale_set_by_the_user_multiplies_the_scalers() -> None:
    """As torch documents for its fused optimisers: the product of both is divided by."""
    for kind in SCALERS:
        parameter = torch.zeros(2)
        parameter.grad = torch.full((2,), 4096.0)
        optimizer = gradfast.SGD([parameter], lr=1.0)
        optimizer.grad_scale = torch.tensor(4.0)
        scaler_of(kind).step(optimizer)
        assert parameter.tolist() == [-1.0, -1.0]
        assert not hasattr(optimizer, "grad_scale")
    optimizer.grad_scale = torch.tensor(1024.0)  # and without a scaler
    optimizer.step()
    assert parameter.tolist() == [-5.0, -5.0]


class CountSearches(TorchDispatchMode):
    """Counts torch's passes over gradients in search of infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_amp_foreach_non_finite_check_and_unscale_" in function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "norm_type", "searches"),
    [
        (torch.amp.GradScaler, 2.0, 1),
        (gradfast.GradScaler, 1.0, 0),
        (gradfast.GradScaler, 2.0, 0),
        (gradfast.GradScaler, float("inf"), 0),
        (gradfast.GradScaler, 3.0, 1),  # this norm may overflow with finite gradients
    ],
)
def test_our_scaler_makes_no_pass_of_its_own(kind: type, norm_type: float, searches: int) -> None:
    ours = parameters()
    optimizer = gradfast.AdamW(ours, max_norm=1.0, norm_type=norm_type)
    scaler = scaler_of(kind)
    give_gradients(ours, 0, 1024.0, "inf")
    with CountSearches() as counter:
        scaler.step(optimizer)
        scaler.update()
    assert counter.count == searches
    assert scaler.get_scale() == 256.0


def test_our_scaler_searches_for_torchs_optimizers_and_when_asked_to() -> None:
    ours = parameters()
    give_gradients(ours, 0, 1024.0, "ok")
    for optimizer in (torch.optim.SGD(ours, lr=0.1), torch.optim.Adam(ours, fused=True)):
        with CountSearches() as counter:
            scaler_of(gradfast.GradScaler).step(optimizer)
        assert counter.count == 1
    with CountSearches() as counter:
        scaler = scaler_of(gradfast.GradScaler)
        optimizer = gradfast.SGD(ours, lr=0.1)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert counter.count == 1


@pytest.mark.parametrize(("source", "target"), [SCALERS, SCALERS[::-1]])
def test_state_of_scalers_is_interchangeable(source: type, target: type) -> None:
    before = scaler_of(source)
    ours = parameters()
    optimizer = gradfast.SGD(ours, lr=0.1)
    for step, event in enumerate(["ok", "ok", "inf", "ok"]):
        give_gradients(ours, step, before.get_scale(), event)
        before.step(optimizer)
        before.update()
    after = scaler_of(target, init_scale=2.0)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    assert pickle.loads(pickle.dumps(before)).state_dict() == before.state_dict()


def test_disabled_scaler_only_steps() -> None:
    parameter = torch.zeros(2)
    parameter.grad = torch.ones(2)
    scaler = gradfast.GradScaler("cpu", enabled=False)
    scaler.step(gradfast.SGD([parameter], lr=1.0))
    scaler.update()
    assert parameter.tolist() == [-1.0, -1.0]
    assert scaler.get_scale() == 1.0
