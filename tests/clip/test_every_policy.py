"""Every way of clipping against every trial: published examples, a float64 oracle, NaN, zeros, one step, a million.

One model of a matrix, a vector and a scalar, stepped by plain gradient descent with a rate of 1, so that what a step
changes is the clipped gradient. `CASES` has a row for each policy, limits of groups and clipped updates included; the
trials are the tests. The rules alone, over thousands of norms, are tested in test_policy_rules.py, and on the device in
tests/device/.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from clip import gradient_oracles as rules
from clip import policy_oracles as oracles
from torch import Tensor

import gradfast
from gradfast import clip
from gradfast._load import native

SHAPES = [(4, 3), (5,), ()]
NAMES = ["body.weight", "body.bias", "scale"]
LIMITS = [0.5, math.inf, 0.25]
STABLE = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


@dataclass
class Case:
    """A way of clipping: how an optimiser is made for it, and the oracle of its steps."""

    optimizer: Callable[[list[tuple[str, Tensor]]], Any]
    oracle: Callable[[], Any]
    policy: clip.Policy | None = None
    remembers: bool = True


def policy(made: clip.Policy, *rule: Callable[[], Callable[..., Any]], remembers: bool = True) -> Case:
    return Case(
        lambda named: gradfast.SGD(named, lr=1.0, clip=made),
        lambda: rules.Clipped(*(make() for make in rule)),
        made,
        remembers,
    )


def with_limits(named: list[tuple[str, Tensor]]) -> gradfast.SGD:
    return gradfast.SGD([{"params": [pair], "max_norm": limit} for pair, limit in zip(named, LIMITS)], lr=1.0)


CASES = {
    "GlobalNorm": policy(clip.GlobalNorm(0.7), lambda: rules.whole(oracles.GlobalNorm(0.7)), remembers=False),
    "Value": policy(clip.Value(0.2), lambda: rules.elements(0.2), remembers=False),
    "PerParameterNorm": policy(
        clip.PerParameterNorm(0.3), lambda: rules.each(oracles.PerParameterNorm(0.3)), remembers=False
    ),
    "AGC": policy(clip.AGC(0.1), lambda: rules.units(0.1, 1e-3), remembers=False),
    "AutoClip": policy(clip.AutoClip(30, 8), lambda: rules.whole(oracles.AutoClip(30, 8))),
    "ZClip": policy(clip.ZClip(2.0, 0.9, 12), lambda: rules.whole(oracles.ZClip(2.0, 0.9, 12))),
    "AdaGC": policy(clip.AdaGC(1.05, 0.9, 1.0, 6), lambda: rules.each(oracles.AdaGC(1.05, 0.9, 1.0, 6))),
    "SkipSpikes": policy(clip.SkipSpikes(3.0, 8), lambda: rules.whole(oracles.SkipSpikes(3.0, 8, exact=False))),
    "SkipSpikes, exact": policy(clip.SkipSpikes(3.0, 8, exact=True), lambda: rules.whole(oracles.SkipSpikes(3.0, 8))),
    "Chain": policy(
        clip.Chain(clip.Value(2.0), clip.SkipSpikes(3.0, 8), clip.ZClip(2.0, 0.9, 12), clip.GlobalNorm(0.9)),
        lambda: rules.elements(2.0),
        lambda: rules.whole(
            oracles.Chain(oracles.SkipSpikes(3.0, 8, exact=False), oracles.ZClip(2.0, 0.9, 12), oracles.GlobalNorm(0.9))
        ),
    ),
    "groups": Case(with_limits, lambda: rules.Clipped(rules.groups(LIMITS)), remembers=False),
    "StableAdamW": Case(
        lambda named: gradfast.AdamW(named, weight_decay=0.1, update_clipping=True, **STABLE),
        lambda: rules.Stable(decay=0.1, **STABLE),
    ),
}
STEPS = 40
# Sums of at most 12 numbers in another order, and a mean that remembers 40 steps of that: a few hundred ulps.
NEAR = {"rtol": 1e-11, "atol": 1e-13}


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    made[0][2] = 0  # a unit that begins at zero
    return made


def gradients(step: int) -> list[np.ndarray]:
    """Their norm is about 1, and 30 times that in two steps behind all warm-ups."""
    draw = np.random.default_rng(step)
    size = (0.8 + 0.1 * (step * 7 % 5)) / math.sqrt(18) * (30 if step in (20, 31) else 1)
    return [np.asarray(size * draw.normal(size=shape)) for shape in SHAPES]


def give(parameters: list[Tensor], values: list[np.ndarray]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.from_numpy(np.array(value))


def start(case: Case, values: list[Tensor] | None = None) -> tuple[list[Tensor], Any]:
    parameters = weights() if values is None else values
    return parameters, case.optimizer(list(zip(NAMES, parameters)))


def follow(case: Case, sequence: list[list[np.ndarray]]) -> int:
    """Step through gradients beside the oracle; returns how many steps changed the weights by less than they asked."""
    parameters, optimizer = start(case)
    oracle = case.oracle()
    expected = [parameter.numpy().copy() for parameter in parameters]
    held = 0
    for values in sequence:
        before = expected
        expected = oracle.step(expected, values)
        give(parameters, values)
        optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(parameter.numpy(), value, **NEAR)
        held += any((abs(old - new - g) > 1e-6).any() for old, new, g in zip(before, expected, values, strict=True))
    return held


def memory(optimizer: Any) -> list[Tensor]:
    """All that a step remembers."""
    saved = optimizer.state_dict()
    states = [value for state in saved["state"].values() for value in state.values() if isinstance(value, Tensor)]
    return states + ([saved["clip_state"]["values"]] if "clip_state" in saved else [])


# ---- the trials ----------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_float64_oracle(name: str) -> None:
    assert follow(CASES[name], [gradients(step) for step in range(STEPS)]) >= 2, "nothing was clipped or skipped"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].policy is not None])
def test_as_a_function_on_gradients(name: str) -> None:
    """`apply_` beside plain gradient descent is the oracle's step, too; a skipped step's gradients become zero."""
    made = CASES[name].policy
    fresh = clip.Chain(*made.policies) if isinstance(made, clip.Chain) else type(made)(**made.settings())
    parameters, oracle = weights(), CASES[name].oracle()
    expected = [parameter.numpy().copy() for parameter in parameters]
    for step in range(STEPS):
        expected = oracle.step(expected, gradients(step))
        give(parameters, gradients(step))
        fresh.apply_(zip(NAMES, parameters))
        for parameter, value in zip(parameters, expected, strict=True):
            parameter.sub_(parameter.grad)
            np.testing.assert_allclose(parameter.numpy(), value, **NEAR)


CLAMPED = ("Value", "Chain")  # make a finite number of infinity, as torch.clamp does


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in CASES for bad in (math.nan, math.inf, -math.inf) if bad != bad or name not in CLAMPED],
)
def test_what_is_not_finite_leaves_no_trace(name: str, bad: float) -> None:
    """In any parameter, before the first good step, inside warm-ups and after: to the bit as if it had not come."""
    clean, dirty = start(CASES[name]), start(CASES[name])
    skips = 0
    for step in range(STEPS):
        for number in range(len(SHAPES)) if step in (0, 3, 11, 25) else ():
            values = gradients(step)
            values[number][(-1,) * len(SHAPES[number])] = bad
            give(dirty[0], values)
            dirty[1].step()
            skips += 1
        for parameters, optimizer in (clean, dirty):
            give(parameters, gradients(step))
            optimizer.step()
    assert dirty[1].skipped_steps - clean[1].skipped_steps == skips == 12
    for mine, other in zip(clean[0] + memory(clean[1]), dirty[0] + memory(dirty[1]), strict=True):
        assert torch.equal(mine, other) and torch.isfinite(mine).all()


@pytest.mark.parametrize("name", CASES)
def test_zeros(name: str) -> None:
    """Gradients of zero, of all parameters or of one, at the start and between others."""
    nothing = [np.zeros(shape) for shape in SHAPES]
    sequence = [nothing] * 3 + [gradients(step) for step in range(STEPS)] + [nothing] * 20
    for step in range(5, 12):
        sequence[step] = [*nothing[:1], *sequence[step][1:]]
    follow(CASES[name], sequence)


@pytest.mark.parametrize("name", CASES)
def test_one_step(name: str) -> None:
    follow(CASES[name], [gradients(0)])
    parameters, optimizer = start(CASES[name], [torch.ones(1, dtype=torch.float64) for _ in SHAPES])
    give(parameters, [np.array([0.01])] * 3)  # a single element each, with a small gradient
    optimizer.step()
    assert all(torch.isfinite(parameter).all() and (parameter < 1).all() for parameter in parameters)


@pytest.mark.parametrize("stop", [1, 7, 13, 21])
@pytest.mark.parametrize("name", CASES)
def test_resumes_to_the_bit(name: str, stop: int) -> None:
    """Saved to a file and loaded into a new optimiser: before, inside and behind the warm-ups and spikes."""
    parameters, optimizer = start(CASES[name])
    for step in range(STEPS):
        if step == stop:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            others, resumed = start(CASES[name], [parameter.clone() for parameter in parameters])
            resumed.load_state_dict(torch.load(file, weights_only=True))
        runs = [(parameters, optimizer)] + ([(others, resumed)] if step >= stop else [])
        for values, one in runs:
            give(values, gradients(step))
            one.step()
    for mine, other in zip(parameters + memory(optimizer), others + memory(resumed), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["AdaGC", "StableAdamW"])
def test_a_million_steps(name: str) -> None:
    """Nothing adds up: after a million steps the next ones are those of an oracle that saw the last few thousand.

    For policies of the global norm a million norms are run in test_policy_rules.py, which takes no optimiser.
    """
    case, count, seen = CASES[name], 1_000_000, 3000
    norms = torch.from_numpy(np.random.default_rng(7).lognormal(0, 0.1, (count, 3)))
    parameters, row = [torch.zeros(1, dtype=torch.float64) for _ in SHAPES], torch.zeros(3, dtype=torch.float64)
    _, optimizer = start(case, parameters)
    for parameter, part in zip(parameters, row.split(1)):
        parameter.grad = part
    for step in range(count - seen):
        row.copy_(norms[step])
        optimizer.step()
    oracle, expected = case.oracle(), [parameter.numpy().copy() for parameter in parameters]
    if name == "StableAdamW":
        oracle.step(expected, [np.zeros(1)] * 3)
        for each, value in zip(oracle.each, expected, strict=True):
            each.t, each.p = count - seen, value
    for step in range(count - seen, count):
        before, theirs = [parameter.numpy().copy() for parameter in parameters], [value.copy() for value in expected]
        expected = oracle.step(expected, list(norms[step].numpy().reshape(3, 1)))
        row.copy_(norms[step])
        optimizer.step()
        if step >= count - 200:
            for parameter, old, new, other in zip(parameters, before, expected, theirs, strict=True):
                np.testing.assert_allclose(parameter.numpy() - old, new - other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].remembers])
def test_no_memory_where_none_is_needed(name: str) -> None:
    """For these the millionth step is as the first."""
    made = CASES[name].policy
    assert made is None or native.PolicyChain(made.program(3)).state_size == 0
    assert memory(start(CASES[name])[1]) == [] or made is not None


# ---- published examples, and numbers by hand ----------------------------------------


# name -> (policy, weights, gradients of one or more steps, clipped gradients of the last step)
EXAMPLES: dict[str, tuple[clip.Policy, list[Any], list[list[Any]], list[Any]]] = {
    # Pascanu et al., algorithm 1: a norm of 5 is brought to 1.
    "GlobalNorm": (clip.GlobalNorm(1.0), [[0.0], [0.0]], [[[3.0], [4.0]]], [[0.6], [0.8]]),
    "GlobalNorm, inf": (clip.GlobalNorm(1.0, math.inf), [[0.0], [0.0]], [[[3.0], [4.0]]], [[0.75], [1.0]]),
    "Value": (clip.Value(1.5), [[0.0, 0.0, 0.0]], [[[-2.0, 1.0, 9.0]]], [[-1.5, 1.0, 1.5]]),
    # Norms 5 and 0.5 with a limit of 1 each.
    "PerParameterNorm": (
        clip.PerParameterNorm(1.0),
        [[0.0, 0.0]] * 2,
        [[[3.0, 4.0], [0.3, 0.4]]],
        [[0.6, 0.8], [0.3, 0.4]],
    ),
    # optax's example: weights (1, 2) and (3, 4), gradients (500, 5) and (300, 3), as vectors one unit each; with a
    # ratio of 1 the gradients' norms become sqrt(5) and 5.
    "AGC": (
        clip.AGC(1.0),
        [[1.0, 2.0], [3.0, 4.0]],
        [[[500.0, 5.0], [300.0, 3.0]]],
        [[math.sqrt(5 / 1.0001), math.sqrt(5 / 1.0001) / 100], [5 / math.sqrt(1.0001), 0.05 / math.sqrt(1.0001)]],
    ),
    # The median of 1, 3 and this step's 2.5.
    "AutoClip": (clip.AutoClip(50, 10), [[0.0]], [[[1.0]], [[3.0]], [[2.5]]], [[2.5]]),
    "AutoClip, above": (clip.AutoClip(50, 10), [[0.0]], [[[1.0]], [[2.5]], [[30.0]]], [[2.5]]),
    # The published code's own test: mean 1, sd 0.5, z limit 2; a norm of 3 has z = 4 and comes to 1 + 1 / (4 / 2).
    "ZClip": (clip.ZClip(2.0, warmup=2), [[0.0]], [[[0.5]], [[1.5]], [[3.0]]], [[1.5]]),
    # Algorithm 1: warm-up of two steps clipped to 1 (norms 5 and 10) leaves gamma = min(0.6, 0.6) and min(0.8, 0.8);
    # then limits are 1.05 of that, which holds the first and lets the second pass.
    "AdaGC": (
        clip.AdaGC(1.05, 0.98, 1.0, warmup=2),
        [[0.0], [0.0]],
        [[[3.0], [4.0]], [[6.0], [8.0]], [[10.0], [0.5]]],
        [[0.63], [0.5]],
    ),
    # gamma of the first after that: 0.98 * 0.6 + 0.02 * 0.63 = 0.6006.
    "AdaGC, next": (
        clip.AdaGC(1.05, 0.98, 1.0, warmup=2),
        [[0.0], [0.0]],
        [[[3.0], [4.0]], [[6.0], [8.0]], [[10.0], [0.5]], [[10.0], [0.5]]],
        [[1.05 * 0.6006], [0.5]],
    ),
    # The mean of two norms before is 2, their sd sqrt(2): the limit is 2 + 6 * sqrt(2) = 10.485.
    "SkipSpikes": (clip.SkipSpikes(6, 2), [[0.0]], [[[1.0]], [[3.0]], [[10.5]]], [[0.0]]),
    "SkipSpikes, below": (clip.SkipSpikes(6, 2), [[0.0]], [[[1.0]], [[3.0]], [[10.4]]], [[10.4]]),
    # Value leaves (3, 4), whose norm is then 5.
    "Chain": (clip.Chain(clip.Value(4.0), clip.GlobalNorm(1.0)), [[0.0], [0.0]], [[[3.0], [40.0]]], [[0.6], [0.8]]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    made, before, steps, clipped = EXAMPLES[name]
    parameters = [torch.tensor(value, dtype=torch.float64) for value in before]
    optimizer = gradfast.SGD(list(zip(NAMES, parameters)), lr=1.0, clip=made)
    for values in steps:
        old = [parameter.clone() for parameter in parameters]
        give(parameters, [np.array(value) for value in values])
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(torch.tensor(value))  # AGC reads them
        old = [parameter.clone() for parameter in parameters]
        optimizer.step()
    for parameter, was, value in zip(parameters, old, clipped, strict=True):
        # 1e-6 in the denominators of norm and score: a millionth.
        np.testing.assert_allclose((was - parameter).numpy(), value, rtol=3e-6, atol=1e-12)


def test_limits_of_groups_by_hand() -> None:
    one, two = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    groups = [{"params": [one], "max_norm": 1.0}, {"params": [two], "max_norm": 20.0}]
    optimizer = gradfast.SGD(groups, lr=1.0)
    give([one, two], [np.array([3.0, 4.0]), np.array([6.0, 8.0])])
    optimizer.step()
    np.testing.assert_allclose(one.numpy(), [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(two.numpy(), [-6.0, -8.0], rtol=1e-6)


def test_clipped_updates_by_hand() -> None:
    """At the first step v = g^2, so RMS = 1 and nothing is clipped. The second gradient is ten times the first:

    beta2 becomes 0.99 * (1 - 0.99) / (1 - 0.99^2) = 0.497487, v = 0.497487 + 0.502513 * 100 = 50.7487, RMS =
    sqrt(100 / 50.7487) = 1.40374; beta1 likewise 0.473684, m = 0.473684 + 0.526316 * 10 = 5.73684, and the step is
    0.1 / 1.40374 * 5.73684 / sqrt(50.7487) = 0.0573684.
    """
    parameter = torch.zeros(1, dtype=torch.float64)
    optimizer = gradfast.AdamW([parameter], weight_decay=0.0, update_clipping=True, **STABLE)
    for gradient, expected in ((1.0, -0.1), (10.0, -0.1 - 0.0573684)):
        give([parameter], [np.array([gradient])])
        optimizer.step()
        assert parameter.item() == pytest.approx(expected, rel=1e-6)


# ---- no row is missing ----------------------------------------


def test_every_policy_is_tried() -> None:
    policies = {
        name for name in dir(clip) if isinstance(kind := getattr(clip, name), type) and issubclass(kind, clip.Policy)
    }
    policies -= {"Policy"}
    assert policies <= set(CASES)
    assert policies <= {name.partition(",")[0] for name in EXAMPLES}
