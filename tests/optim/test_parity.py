"""gradfast against torch.optim + clip_grad_norm_ in float64: the same parameters and state over many steps."""

from __future__ import annotations

import pytest
import torch
from optim.pairs import gradients, parameters, run_pair

import gradfast
from gradfast import get_total_norm

SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.0, "momentum": 0.5},
    {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9},
]
ADAM_OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 0.01, "amsgrad": True, "maximize": True},
    {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.2},
]
CASES = [("SGD", options) for options in SGD_OPTIONS]
CASES += [(name, options) for name in ("Adam", "AdamW") for options in ADAM_OPTIONS]


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_float64_equals_torch(name: str, options: dict, max_norm: float | None) -> None:
    # 1e-12: some hundred times the rounding of one float64 operation, over seven steps.
    ours, theirs, fast, oracle = run_pair(name, options, max_norm=max_norm)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
        for key, value in oracle.state[other].items():
            if value is not None:
                torch.testing.assert_close(fast.state[mine][key], value, rtol=1e-12, atol=1e-12, check_dtype=False)


# Half a unit in the last place of the storage type, and the float32 arithmetic's few roundings on top. Absolute: a
# subnormal's spacing.
UNIT = {torch.float32: (2.0**-21, 1e-37), torch.bfloat16: (2.0**-8, 1e-37), torch.float16: (2.0**-10, 2.0**-24)}


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("name", "options"), [CASES[i] for i in (1, 2, 3, 7, 9, 12)])
def test_each_step_in_lower_precision_is_the_rounded_float64_step(name: str, options: dict, dtype: torch.dtype) -> None:
    """Before each step the float64 oracle takes over our stored values, so that roundings do not pile up."""
    ours = parameters(dtype)
    theirs = [p.detach().double() for p in ours]
    fast = getattr(gradfast, name)(ours, max_norm=1.0, **options)
    oracle = getattr(torch.optim, name)(theirs, foreach=False, **options)
    for step_gradients in gradients(ours, steps=5):
        for mine, other, gradient in zip(ours, theirs, step_gradients, strict=True):
            other.copy_(mine.detach())
            for key, value in oracle.state[other].items():
                value.copy_(fast.state[mine][key])
            mine.grad = gradient.to(dtype)
            other.grad = mine.grad.double()
        norm = torch.cat([other.grad.flatten() for other in theirs]).norm()
        torch.testing.assert_close(get_total_norm([p.grad for p in ours]), norm.float(), rtol=2.0**-23, atol=0)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fast.step()
        oracle.step()
        rtol, atol = UNIT[dtype]
        for mine, other in zip(ours, theirs, strict=True):
            for key, value in oracle.state[other].items():
                found = fast.state[mine][key].double()
                # A difference of near-equal numbers loses digits: a unit of the largest addend, not of the result.
                torch.testing.assert_close(found, value.double(), rtol=rtol, atol=atol + rtol * 2.0**-6)
            torch.testing.assert_close(mine.detach().double(), other, rtol=rtol, atol=max(atol, rtol * 2.0**-6))


@pytest.mark.parametrize("norm_type", [1.0, 1.5, 3.0, float("inf")])
def test_every_norm(norm_type: float) -> None:
    ours, theirs, _, _ = run_pair("SGD", {"lr": 0.1, "momentum": 0.9}, norm_type=norm_type)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_lr_scheduler_and_changed_groups() -> None:
    def change(step: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0]["momentum"] = 0.9 if step != 3 else 0.5

    ours, theirs, _, _ = run_pair("SGD", {"lr": 1.0, "momentum": 0.9}, each_step=change)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
