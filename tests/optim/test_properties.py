"""Drawn at random: shapes, strides, types, options and values, against the plain float64 oracle.

Thousands of cases, the same at every run. `pytest --hypothesis-profile explore` draws new ones, and many more.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim import oracle
from torch import Tensor

import gradfast

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Tails of vectors of every width; rarely, more than the engine's chunk of 65,536.
VECTORS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 1000]).map(lambda n: (n,))
SMALL = st.lists(st.integers(0, 9), max_size=4).map(tuple)
SHAPES = st.integers(0, 30).flatmap(lambda n: st.sampled_from([(65_537,), (257, 256)]) if n == 0 else VECTORS | SMALL)
LAYOUTS = ["dense", "transposed", "gapped", "offset", "backwards"]


@dataclass
class Drawn:
    """A tensor in some layout, and the memory that it lies in."""

    tensor: Tensor
    memory: Tensor


def values(generator: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of the kind, in float64: all of them exact in `dtype`."""
    info = torch.finfo(dtype)
    drawn = generator.standard_normal(shape)
    if kind == "zeros":
        drawn = drawn * 0
    elif kind == "wide":  # magnitudes from denormal to huge, side by side
        drawn = np.sign(drawn) * np.exp(generator.uniform(math.log(info.tiny / 1024), math.log(info.max) / 2, shape))
    elif kind == "huge":
        drawn = np.sign(drawn) * float(info.max) * generator.uniform(0.25, 1, shape)
    elif kind == "denormal":
        drawn = drawn * float(info.tiny) / 8
    elif kind == "special":
        special = [0.0, -0.0, 1.0, -1.0, float(info.tiny), float(info.smallest_normal * info.eps), -float(info.max)]
        drawn = generator.choice(special, shape)
    return torch.as_tensor(drawn, dtype=torch.float64).reshape(shape).to(dtype).double()


def spoil(generator: np.random.Generator, tensor: Tensor, with_what: float | None) -> None:
    """Put one value that is not finite somewhere."""
    if with_what is not None and tensor.numel():
        tensor.view(-1)[int(generator.integers(tensor.numel()))] = with_what


def laid_out(exact: Tensor, dtype: torch.dtype, layout: str) -> Drawn:
    """A tensor with these values whose elements lie in memory in that way, amid sevens that are not its own."""
    shape = exact.shape
    if layout == "transposed" or layout == "backwards":
        order = (
            tuple(reversed(range(len(shape)))) if layout == "backwards" else (*range(1, len(shape)), 0)[: len(shape)]
        )
        memory = torch.full([shape[d] for d in order], 7.0, dtype=dtype)
        tensor = memory.permute([order.index(d) for d in range(len(shape))])
    elif layout == "gapped" and shape:
        memory = torch.full((*shape[:-1], 2 * shape[-1] + 1), 7.0, dtype=dtype)
        tensor = memory[..., 1::2][..., : shape[-1]]
    else:
        memory = torch.full((exact.numel() + 5,), 7.0, dtype=dtype)
        start = 3 if layout == "offset" else 0
        tensor = memory[start : start + exact.numel()].view(shape)
    tensor.copy_(exact)
    return Drawn(tensor, memory)


@st.composite
def options_of(draw: st.DrawFn, name: str) -> dict:
    options = {
        "lr": draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "maximize": draw(st.booleans()),
        "l1": draw(st.sampled_from([0.0, 0.0, 0.02])),
    }
    if name == "SGD":
        options["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
        options["nesterov"] = bool(options["momentum"]) and draw(st.booleans())
        options["dampening"] = 0.0 if options["nesterov"] else draw(st.sampled_from([0.0, 0.3, 1.0]))
        return options
    options["betas"] = draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.95, 0.0), (0.3, 0.95)]))
    options["eps"] = draw(st.sampled_from([1e-8, 1e-3, 1.0]))
    options["amsgrad"] = draw(st.booleans())
    return options


KINDS = ["normal", "normal", "wide", "huge", "denormal", "zeros", "special"]
BAD = [None, None, None, math.nan, math.inf, -math.inf]


def expected_step(name: str, p: Tensor, g: Tensor, state: dict, options: dict, scale: float, steps: int) -> dict:
    u = oracle.unit(p.dtype)
    p, g = p.double(), g.double()
    state = {key: value.double() for key, value in state.items() if key != "step"}
    if name == "SGD":
        return oracle.sgd(p, g, {} if steps == 1 else state, options, scale, u)
    fresh = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    return oracle.adam(p, g, fresh | state, {**options, "decoupled": name == "AdamW"}, scale, u, steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@settings(max_examples=150)
@given(data=st.data())
def test_steps(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Three steps of up to three tensors. After each the oracle goes on from our values: roundings do not pile up."""
    draw = data.draw
    options = draw(options_of(name))
    max_norm = draw(st.sampled_from([None, 1e-3, 1.0, 1e6]))
    p_norm = draw(st.sampled_from([2.0, 2.0, 1.0, 3.0, math.inf]))
    nonfinite = draw(st.sampled_from(["skip", "propagate"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    kind = draw(st.sampled_from(["normal", "normal", "wide", "special", "zeros"]))
    drawn = [laid_out(values(generator, kind, s, dtype), dtype, draw(st.sampled_from(LAYOUTS))) for s in shapes]
    parameters = [d.tensor for d in drawn]
    optimizer = getattr(gradfast, name)(parameters, max_norm=max_norm, norm_type=p_norm, nonfinite=nonfinite, **options)
    updates = [0] * len(parameters)
    for _ in range(3):
        bad, victim = draw(st.sampled_from(BAD)), draw(st.integers(0, 2))
        for number, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
            exact = values(generator, draw(st.sampled_from(KINDS)), shape, dtype)
            spoil(generator, exact, bad if number == victim else None)
            gradient = laid_out(exact, dtype, draw(st.sampled_from(LAYOUTS)))
            absent = draw(st.integers(0, 5)) == 0
            parameter.grad = None if absent else gradient.tensor
        step_and_check(name, optimizer, drawn, updates, options, (max_norm, p_norm, nonfinite))


def step_and_check(
    name: str, optimizer: torch.optim.Optimizer, drawn: list[Drawn], updates: list[int], options: dict, clipping: tuple
) -> None:
    parameters = [d.tensor for d in drawn]
    active = [i for i, p in enumerate(parameters) if p.grad is not None]
    gradients = [parameters[i].grad.clone() for i in active]
    max_norm, p_norm, nonfinite = clipping
    decision = oracle.decide(oracle.total_norm(gradients, p_norm), max_norm, nonfinite)
    before = [(p.clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in parameters]
    optimizer.step()
    check_norm(optimizer.grad_norm, decision.norm, gradients, p_norm)
    for gradient, i in zip(gradients, active, strict=True):
        torch.testing.assert_close(parameters[i].grad, gradient, rtol=0, atol=0, equal_nan=True)
    for i, (parameter, (old, state)) in enumerate(zip(parameters, before, strict=True)):
        found = {"parameter": parameter, **optimizer.state[parameter]}
        if decision.skip or i not in active:
            for key, value in {"parameter": old, **state}.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)
            continue
        updates[i] += 1
        gradient = gradients[active.index(i)]
        expected = expected_step(name, old, gradient, state, options, decision.scale, updates[i])
        for key, value in expected.items():
            oracle.check(found[key], value, f"{key} of tensor {i}, update {updates[i]}")
    for d in drawn:  # nothing beside the tensors was written
        assert d.memory.numel() - int((d.memory == 7.0).sum()) <= d.tensor.numel()


def check_norm(found: Tensor, norm: float, gradients: list[Tensor], p: float = 2.0) -> None:
    """The norm is right to the last places of what it is returned in; float32 cannot hold the largest of them."""
    largest = torch.finfo(found.dtype).max
    if not abs(norm) <= largest * (1 - 1e-6):
        assert not math.isfinite(found.item()) or found.item() >= largest * (1 - 1e-6)
        return
    additions = 1 + sum(g.numel() for g in gradients)
    # The powers are summed in float64, where those of float64's own smallest numbers vanish.
    relative, absolute = 2.0**-50 * math.log2(2 * additions), (additions * 2.0**-1074) ** (1 / p)
    if found.dtype == torch.float32:
        relative, absolute = 2.0**-23, 2.0**-149
    assert abs(found.item() - norm) <= relative * norm + absolute, (found.item(), norm)


@settings(max_examples=1000)
@given(data=st.data())
def test_norm_and_clip_functions(data: st.DataObject) -> None:
    """Tensors of different types in one call, norms of any p, and all three ways to clip."""
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p_norm = draw(st.sampled_from([1.0, 1.5, 2.0, 2.0, 4.0, math.inf]))
    max_norm = draw(st.sampled_from([1e-3, 1.0, 1e4]))
    bad = draw(st.sampled_from(BAD))
    parameters, exact = [], []
    for number in range(draw(st.integers(1, 4))):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
        kind = draw(st.sampled_from([k for k in KINDS if dtype != torch.float64 or k not in ("huge", "wide")]))
        gradient = values(generator, kind, shape, dtype)
        spoil(generator, gradient, bad if number == 0 else None)
        parameter = torch.zeros(shape, dtype=dtype)
        parameter.grad = laid_out(gradient, dtype, draw(st.sampled_from(LAYOUTS))).tensor
        parameters.append(parameter)
        exact.append(gradient)
    norm = oracle.total_norm(exact, p_norm)
    found = gradfast.get_total_norm([p.grad for p in parameters], p_norm)
    assert found.dtype == (torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32)
    check_norm(found, norm, exact, p_norm)
    way = draw(st.sampled_from(["norm", "given norm", "value"]))
    if way == "value":
        gradfast.clip_grad_value_(parameters, max_norm)
        for parameter, gradient in zip(parameters, exact, strict=True):
            limit = torch.tensor(max_norm, dtype=parameter.dtype).double().item()
            clamped = gradient.clamp(-limit, limit)
            torch.testing.assert_close(parameter.grad.double(), clamped, rtol=0, atol=0, equal_nan=True)
        return
    if way == "norm":
        check_norm(gradfast.clip_grad_norm_(parameters, max_norm, p_norm), norm, exact, p_norm)
    else:
        gradfast.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm, dtype=torch.float64))
    scale = oracle.decide(norm, max_norm, "propagate").scale
    for parameter, gradient in zip(parameters, exact, strict=True):
        result = oracle.Value(*oracle.scaled(gradient, scale, oracle.unit(parameter.dtype)))
        oracle.check(parameter.grad, result, "gradient")


@settings(max_examples=300)
@given(data=st.data())
def test_expanded_gradients(data: st.DataObject) -> None:
    """A gradient whose elements share memory counts once for every place where it is seen."""
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shared = [length if draw(st.booleans()) else 1 for length in shape]
    gradient = values(generator, "normal", tuple(shared), dtype).to(dtype).expand(shape)
    parameter = torch.zeros(shape, dtype=dtype)
    parameter.grad = gradient
    optimizer = gradfast.SGD([parameter], lr=1.0, max_norm=1.0)
    optimizer.step()
    decision = oracle.decide(oracle.total_norm([gradient], 2.0), 1.0, "skip")
    check_norm(optimizer.grad_norm, decision.norm, [gradient])
    oracle.check(
        parameter, oracle.Value(*oracle.scaled(gradient.double(), -decision.scale, oracle.unit(dtype))), "parameter"
    )


def test_oracle_equals_torch() -> None:
    """The oracle itself, against torch.optim in float64, over every combination of options that it knows."""
    for momentum, dampening, decay, maximize in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True)):
        options = {"lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": decay, "maximize": maximize}
        compare_with_torch("SGD", options, {"nesterov": False})
    for betas, decay, amsgrad, maximize in itertools.product(
        ((0.9, 0.99), (0.0, 0.5)), (0.0, 0.1), (False, True), (False, True)
    ):
        options = {"lr": 0.1, "betas": betas, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
        for name in ("Adam", "AdamW"):
            compare_with_torch(name, options, {"eps": 1e-8})


def compare_with_torch(name: str, options: dict, implied: dict) -> None:
    parameter = torch.randn(50, dtype=torch.float64)
    optimizer = getattr(torch.optim, name)([parameter], foreach=False, **options)
    for step in (1, 2, 3):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        old, state = parameter.clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
        optimizer.step()
        expected = expected_step(name, old, parameter.grad, state, {**options, **implied, "l1": 0.0}, 1.0, step)
        torch.testing.assert_close(parameter, expected["parameter"].value, rtol=1e-13, atol=1e-13)
        assert (expected["parameter"].error <= 1e-12).all()  # the bound is a tight one where nothing cancels
