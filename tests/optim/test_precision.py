"""The dtype of states, the arithmetic between formats, and what the options refuse."""

from __future__ import annotations

import math

import pytest
import torch
from optim.narrow import NARROW, assert_same, parameters, train

import gradfast


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.bfloat16, {}, torch.bfloat16),  # as torch
        (torch.float32, {"state_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.bfloat16, {"state_dtype": torch.float32}, torch.float32),
        (torch.bfloat16, {"master_weights": True}, torch.float32),
        (torch.float16, {"master_weights": True, "state_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float16, {"stochastic_rounding": True}, torch.float32),
        (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float64, {"state_dtype": torch.bfloat16}, torch.float64),
    ],
)
@pytest.mark.parametrize(("name", "extra"), [("SGD", {"momentum": 0.9}), ("AdamW", {"amsgrad": True}), ("Lion", {})])
def test_dtype_of_states(name: str, extra: dict, dtype: torch.dtype, options: dict, expected: torch.dtype) -> None:
    ours = parameters(dtype, [(1000,)])
    optimizer = getattr(gradfast, name)(ours, lr=1e-3, max_norm=1.0, **options, **extra)
    double = [p.detach().double().requires_grad_() for p in ours]
    oracle = getattr(gradfast, name)(double, lr=1e-3, max_norm=1.0, **extra)
    train(optimizer, ours, dtype, range(5))
    train(oracle, double, dtype, range(5))
    state = optimizer.state[ours[0]]
    for key, value in oracle.state[double[0]].items():
        if key in ("step", "master_param"):
            continue
        assert state[key].dtype == expected
        # Five roundings of the state type, each of at most a whole unit (half a unit to nearest), of addends below 4.
        unit = {torch.float64: 2.0**-40, torch.float32: 2.0**-20}.get(expected, 2.0**-7)
        torch.testing.assert_close(state[key].double(), value, rtol=5 * unit, atol=5 * unit * value.abs().max().item())


def test_a_second_moment_in_bf16_falls_again() -> None:
    """v <- 0.999 v: to nearest, bf16 returns v for ever; by chance it decays as it should, to 0.999^2000 = 0.135."""
    results = {}
    for how, options in (("nearest", {}), ("chance", {"state_dtype": torch.bfloat16})):
        parameter = torch.zeros(20_000, dtype=torch.bfloat16)
        optimizer = gradfast.AdamW([parameter], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, **options)
        parameter.grad = torch.full_like(parameter, 32.0)  # v is 1.024 after the first step
        optimizer.step()
        parameter.grad.zero_()
        for _ in range(2000):
            optimizer.step()
        results[how] = optimizer.state[parameter]["exp_avg_sq"].double().mean().item()
    assert results["nearest"] > 1.0
    # Each of 2000 roundings adds a variance below 2^-18 v^2 to log v; the mean over 20,000 elements errs by 0.1 %.
    assert results["chance"] == pytest.approx(1.024 * 0.999**2000, rel=0.01)


def test_every_half_is_widened_and_rounded_as_torch_does() -> None:
    """All 65,536 of them pass a step that adds nothing; and a master's rounding is torch's, ties and subnormals too."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)]
    parameter = every.clone()
    parameter.grad = torch.zeros_like(parameter)
    gradfast.SGD([parameter], lr=1.0).step()
    assert torch.equal(parameter.view(torch.int16), every.view(torch.int16))

    gaps = every.sort().values.float()
    between = torch.cat([gaps, (gaps[1:] + gaps[:-1]) / 2, torch.tensor([65_519.0, 65_520.0, 1e30, -math.inf])])
    near = torch.cat([torch.nextafter(between, torch.full_like(between, sign * math.inf)) for sign in (1, -1)])
    exact = torch.cat([between, near])
    parameter = torch.zeros(len(exact), dtype=torch.float16)
    parameter.grad_dtype = torch.float32
    parameter.grad = -exact
    optimizer = gradfast.SGD([parameter], lr=1.0, master_weights=True, nonfinite="propagate")
    optimizer.step()
    assert_same(optimizer.state[parameter]["master_param"], exact)
    assert_same(parameter, exact.half())


def test_nan_stays_nan_in_sixteen_bits() -> None:
    for dtype in NARROW:
        parameter = torch.ones(33, dtype=dtype)
        parameter.grad = torch.full_like(parameter, math.nan)
        gradfast.SGD([parameter], lr=1.0, nonfinite="propagate").step()
        assert parameter.isnan().all()


def test_float32_gradients_of_a_bf16_parameter() -> None:
    """As FSDP and Megatron accumulate them; torch permits it where `grad_dtype` says so."""
    parameter = torch.ones(600, dtype=torch.bfloat16)
    parameter.grad_dtype = torch.float32
    parameter.grad = exact = torch.linspace(-1, 1, 600)
    optimizer = gradfast.SGD([parameter], lr=1.0, momentum=0.9, master_weights=True, max_norm=1e9)
    optimizer.step()
    assert_same(optimizer.state[parameter]["master_param"], 1 - exact)
    torch.testing.assert_close(optimizer.grad_norm, exact.norm(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_weights": True, "stochastic_rounding": True}, "exclude each other"),
        ({"state_dtype": torch.float16}, r"state_dtype.*torch\.float16"),
        ({"rounding_seed": -1}, "rounding_seed"),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
def test_bad_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(gradfast, name)([torch.ones(1)], **options)


def test_what_does_not_go_together_is_named() -> None:
    parameter = torch.ones(3)
    parameter.grad_dtype = None
    parameter.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"gradient of 'layer\.weight' has dtype Double"):
        gradfast.SGD([("layer.weight", parameter)], lr=1.0).step()


def test_repr_tells_the_precision() -> None:
    optimizer = gradfast.SGD([torch.ones(1)], state_dtype=torch.bfloat16)
    assert "precision: state_dtype=torch.bfloat16" in repr(optimizer)
    assert "precision" not in repr(gradfast.SGD([torch.ones(1)]))
