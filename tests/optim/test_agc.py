"""AGC inside the step, against the published rule in float64: what is updated, what the norm is of, what stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim import agc_oracle
from optim.agc_cases import LARGE, SHAPES, after_agc, copies, norm_of, tensors
from torch import Tensor

import gradfast
from gradfast import clip


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_by_hand() -> None:
    """|W| = 5, |G| = 10, clipping 0.01: the gradient is scaled to 0.05. The second unit is small enough."""
    weight = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    weight.grad = torch.tensor([[6.0, 8.0], [0.3, 0.4]])
    optimizer = gradfast.SGD([("w", weight)], lr=1.0, clip=clip.AGC())
    optimizer.step()
    torch.testing.assert_close(weight, torch.tensor([[2.97, 3.96], [29.7, 39.6]]))
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(0.05**2 + 0.5**2), rel=1e-6)
    assert torch.equal(weight.grad, torch.tensor([[6.0, 8.0], [0.3, 0.4]]))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("SGD", SHAPES), ("AdamW", SHAPES), ("Lion", SHAPES), ("AdamW", LARGE)],
    ids=["SGD", "AdamW", "Lion", "AdamW, large"],
)
def test_as_published(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Three steps, each as the same optimiser without AGC takes it from gradients that the oracle clipped."""
    named = tensors(shapes)
    others = copies(named)
    options = {"momentum": 0.9, "weight_decay": 0.01} if name == "SGD" else {"weight_decay": 0.01}
    optimizer = getattr(gradfast, name)(named.items(), lr=0.1, clip=clip.AGC(0.3), **options)
    reference = getattr(gradfast, name)(others.items(), lr=0.1, **options)
    for step in range(3):
        left = after_agc(named)
        given_gradients = {key: p.grad.clone() for key, p in named.items()}
        for key, other in others.items():
            other.grad = left[key]
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm_of(left), rel=1e-13)
        for key, norm in optimizer.grad_norms().items():
            assert norm.item() == pytest.approx(left[key].norm().item(), rel=1e-12), key
        for key, p in named.items():
            assert torch.equal(p.grad, given_gradients[key]), "the gradient stays as backward wrote it"
            torch.testing.assert_close(p, others[key], rtol=1e-11, atol=1e-13, msg=lambda m, k=key: f"{k}: {m}")
            p.grad = tensors({key: p.shape}, seed=step + 1)[key].grad
    assert named[next(iter(named))][2].abs().max() > 0, "a unit at zero trains"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """In the parameter's precision; the norm is of exact gradients, which nobody rounds on the way."""
    named = tensors(SHAPES, dtype)
    before, left = copies(named), after_agc(named)
    optimizer = gradfast.SGD(named.items(), lr=1.0, clip=clip.AGC(0.3))
    optimizer.step()
    for name, p in named.items():
        expected = before[name].double() - left[name]
        error = (p.double() - expected).abs()
        assert (error <= tolerance * expected.abs() + 2e-7 * left[name].abs() + 1e-7).all(), name
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(left), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"master_weights": True}, {"stochastic_rounding": True}, {"state_dtype": torch.float32}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_that_nothing_reaches_changes_no_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Units are stepped in pieces; the random bits of each element are the same ones."""
    shapes = {"tall": (50_001, 3), "wide": (3, 50_001), "small": (7, 3, 2), "vector": (1001,)}
    named = tensors(shapes, dtype)
    others = copies(named)
    optimizer = gradfast.AdamW(named.items(), lr=0.1, clip=clip.AGC(1e9), **options)
    reference = gradfast.AdamW(others.items(), lr=0.1, **options)
    for _ in range(2):
        optimizer.step()
        reference.step()
    for name, p in named.items():
        assert torch.equal(p, others[name]), name
        for key, state in optimizer.state[p].items():
            assert torch.equal(state, reference.state[others[name]][key]), (name, key)


def test_rounding_by_chance_is_of_the_element_and_not_of_the_piece() -> None:
    """Clipped units that begin between two draws of random bits round as if their gradients had come so."""
    named = {"w": torch.randn(9, 7).bfloat16()}
    named["w"].grad = torch.randn(9, 7).bfloat16()
    named["w"].grad[::2] *= 2.0**10  # the factors of these are powers of two below
    named["w"].data[:] = 0
    others = copies(named)
    sizes = named["w"].grad.double().norm(dim=1)
    options = {"lr": 1.0, "stochastic_rounding": True, "rounding_seed": 3}
    optimizer = gradfast.SGD(named.items(), clip=clip.AGC(2.0**-3, eps=1.0), **options)
    optimizer.step()
    others["w"].grad_dtype = None
    others["w"].grad = (others["w"].grad.double() * torch.clamp(2.0**-3 / sizes, max=1.0)[:, None]).float()
    gradfast.SGD(others.items(), **options).step()
    same = (named["w"] == others["w"]).double().mean()
    assert same > 0.95, "a product rounded to fp32 may differ in its last bit, and seldom in the rounded result"


def test_masters_are_the_weights() -> None:
    """The master, which the step updates, is what a 16-bit parameter's gradient is compared with."""
    weight = torch.full((2, 4), 1.0, dtype=torch.bfloat16)
    optimizer = gradfast.SGD([("w", weight)], lr=1e-4, clip=clip.AGC(0.5, eps=1e-9), master_weights=True)
    weight.grad = torch.full((2, 4), 1e-3, dtype=torch.bfloat16)
    optimizer.step()
    master = optimizer.state[weight]["master_param"]
    master[:] = torch.tensor([[1.003] * 4, [1.0] * 4])  # both round to 1 in bf16
    weight.grad = torch.full((2, 4), 4.0, dtype=torch.bfloat16)
    before = master.clone()
    optimizer.step()
    expected = before.double() - 1e-4 * 0.5 * before.double()
    torch.testing.assert_close(master.double(), expected, rtol=1e-7, atol=0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous(),
    "gapped": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, ...], str, str, float, int]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    layout = st.sampled_from(list(LAYOUTS))
    return shape, draw(layout), draw(layout), draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])), draw(st.integers(0, 99))


@given(problems())
def test_shapes_and_layouts(problem: tuple[tuple[int, ...], str, str, float, int]) -> None:
    """Row-major units, whatever the memory order of weights and gradients, and of their states."""
    shape, of_weight, of_gradient, clipping, seed = problem
    drawn = tensors({"w": shape}, seed=seed)["w"]
    weight = LAYOUTS[of_weight](drawn.detach()) if drawn.ndim else drawn.detach()
    gradient = LAYOUTS[of_gradient](drawn.grad) if drawn.ndim else drawn.grad
    weight.grad = gradient
    left = after_agc({"w": weight}, clipping=clipping)["w"]
    other = drawn.detach().clone()
    other.grad = left
    optimizer = gradfast.AdamW([("w", weight)], lr=0.1, clip=clip.AGC(clipping))
    reference = gradfast.AdamW([("w", other)], lr=0.1)
    for _ in range(2):  # the second takes the engine's quick way
        left = after_agc({"w": weight}, clipping=clipping)["w"]
        other.grad = left
        optimizer.step()
        reference.step()
        torch.testing.assert_close(weight, other, rtol=1e-11, atol=1e-13)
        assert optimizer.grad_norm.item() == pytest.approx(norm_of({"w": left}), rel=1e-12)


@pytest.mark.parametrize("other", ["transposed", "another shape"])
def test_data_that_is_exchanged_between_steps(other: str) -> None:
    """`parameter.data = ...` of as many elements, all arrays alike: units are found anew."""
    weight = torch.randn(6, 4, dtype=torch.float64)
    weight.grad = torch.randn(6, 4, dtype=torch.float64) * 100
    optimizer = gradfast.SGD([("w", weight)], lr=0.1, clip=clip.AGC(0.1))
    optimizer.step()
    optimizer.step()
    data, gradient = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64) * 100
    if other == "transposed":
        data, gradient = data.t().contiguous().t(), gradient.t().contiguous().t()
    else:
        data, gradient = data.view(3, 8), gradient.view(3, 8)
    weight.grad = None
    weight.data = data.clone(memory_format=torch.preserve_format)
    weight.grad = gradient
    expected = data - 0.1 * after_agc({"w": weight}, clipping=0.1)["w"]
    optimizer.step()
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-14)


def test_complex_units_count_both_parts() -> None:
    weight = torch.randn(5, 3, dtype=torch.complex128)
    weight.grad = torch.randn(5, 3, dtype=torch.complex128) * torch.tensor([0.01, 1, 10, 100, 0.1])[:, None]
    transposed = weight.detach().t().contiguous().t()
    transposed.grad = weight.grad.clone()
    expected = weight - torch.from_numpy(agc_oracle.clipped(weight.numpy(), weight.grad.numpy(), 0.3))
    for given_weight in (weight, transposed):
        gradfast.SGD([("w", given_weight)], lr=1.0, clip=clip.AGC(0.3)).step()
        torch.testing.assert_close(given_weight, expected, rtol=1e-12, atol=1e-14)


def test_a_hundred_thousand_tiny_units() -> None:
    """Of one and of three elements: a unit of one is held to a part of its weight's magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(131_079, 1, generator=generator, dtype=torch.float64)
    weight.grad = torch.randn(131_079, 1, generator=generator, dtype=torch.float64)
    triples = torch.randn(100_001, 3, generator=generator, dtype=torch.float64)
    triples.grad = torch.randn(100_001, 3, generator=generator, dtype=torch.float64)
    limit = 0.3 * weight.abs().clamp(min=1e-3)
    of_triples = triples.grad * torch.clamp(0.3 * triples.norm(dim=1) / triples.grad.norm(dim=1), max=1.0)[:, None]
    expected = weight - torch.maximum(torch.minimum(weight.grad, limit), -limit), triples - of_triples
    gradfast.SGD([("w", weight), ("t", triples)], lr=1.0, clip=clip.AGC(0.3)).step()
    torch.testing.assert_close((weight, triples), expected, rtol=1e-12, atol=1e-15)


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    results = []
    for number in (1, 2, 3):
        threads(number)
        named = tensors(LARGE, torch.float32)
        optimizer = gradfast.AdamW(named.items(), lr=0.1, clip=clip.Chain(clip.AGC(0.01), clip.GlobalNorm(0.5)))
        for _ in range(2):
            optimizer.step()
        results.append((named, optimizer.grad_norm, optimizer._engine.report().sum))
    for named, norm, total in results[1:]:
        assert torch.equal(norm, results[0][1]) and total == results[0][2]
        assert all(torch.equal(p, results[0][0][name]) for name, p in named.items())


def test_excluded_names_and_vectors() -> None:
    named = tensors(SHAPES)
    before, left = copies(named), after_agc(named)
    gradfast.SGD(named.items(), lr=1.0, clip=clip.AGC(0.3, exclude=["head.*"], vectors=False)).step()
    for name, p in named.items():
        alone = name == "head.weight" or p.ndim <= 1
        torch.testing.assert_close(
            p, before[name] - (before[name].grad if alone else left[name]), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("where", ["tensor", "scaler"])
def test_limits_are_of_unscaled_gradients(where: str) -> None:
    scale = 512.0
    named = tensors(SHAPES)
    for p in named.values():
        p.grad *= scale
    before, left = copies(named), after_agc(named, scale)
    optimizer = gradfast.SGD(named.items(), lr=1.0, clip=clip.AGC(0.3))
    optimizer.grad_scale = torch.tensor(scale)
    if where == "scaler":
        optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    for name, p in named.items():
        torch.testing.assert_close(p, before[name] - left[name], rtol=1e-12, atol=1e-14)
    assert optimizer.grad_norm.item() == pytest.approx(norm_of(left), rel=1e-12)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_skips_the_step(shapes: dict[str, tuple[int, ...]], bad: float) -> None:
    named = tensors(shapes)
    name = list(named)[2]
    named[name].grad.view(-1)[-1] = bad
    before = copies(named)
    optimizer = gradfast.SGD(named.items(), lr=1.0, momentum=0.9, clip=clip.AGC(0.3))
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not math.isfinite(optimizer.grad_norm.item())
    assert optimizer.nonfinite_parameter == name and optimizer.found_infinite().item() == 1
    assert all(torch.equal(named[key], before[key]) for key in named)
    named[name].grad.view(-1)[-1] = 0.0
    left = after_agc(named)
    optimizer.step()
    for key, p in named.items():
        torch.testing.assert_close(p, before[key] - left[key], rtol=1e-12, atol=1e-14)


def test_raise_and_propagate() -> None:
    named = tensors(SHAPES)
    named["head.weight"].grad[2, 3] = math.nan
    before, others = copies(named), copies(named)
    with pytest.raises(RuntimeError, match=r"'head\.weight'"):
        gradfast.SGD(named.items(), lr=1.0, nonfinite="raise", clip=clip.AGC(0.3)).step()
    assert all(torch.equal(named[key], before[key]) for key in named)
    left = after_agc(others)
    gradfast.SGD(others.items(), lr=1.0, nonfinite="propagate", clip=clip.AGC(0.3)).step()
    for name, p in others.items():  # a unit with NaN is left alone, and the NaN with it
        torch.testing.assert_close(p, before[name] - left[name], rtol=1e-12, atol=1e-14, equal_nan=True)


def test_nothing_but_zeros() -> None:
    named = tensors(SHAPES)
    for p in named.values():
        p.grad.zero_()
    before = copies(named)
    optimizer = gradfast.SGD(named.items(), lr=1.0, clip=clip.AGC(0.3))
    optimizer.step()
    assert optimizer.grad_norm.item() == 0 and optimizer.skipped_steps == 0
    assert all(torch.equal(named[key], before[key]) for key in named)


def test_parameters_without_a_gradient_and_groups_added_later() -> None:
    named = tensors({"a": (4, 5), "b": (3, 3), "c": (2, 6)})
    gradient, named["a"].grad = named["a"].grad, None
    before = copies(named)
    first = {key: named[key] for key in "ab"}
    optimizer = gradfast.SGD(first.items(), lr=1.0, clip=clip.AGC(0.3, exclude=["c"]))
    optimizer.step()
    assert torch.equal(named["a"], before["a"])
    optimizer.add_param_group({"params": [("c", named["c"])]})
    named["a"].grad = gradient
    before, left = copies(named), after_agc(named)
    optimizer.step()
    left["c"] = named["c"].grad
    for key, p in named.items():
        torch.testing.assert_close(p, before[key] - left[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("weights", "gradients"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_as_a_function(weights: torch.dtype, gradients: torch.dtype) -> None:
    for shapes in (SHAPES, {"wide": (3, 100_001), "turned": (7, 5)}):
        named = tensors(shapes, weights)
        if "turned" in named:
            turned = named["turned"].detach().t().contiguous().t()
            turned.grad, named["turned"] = named["turned"].grad, turned
        for name, p in named.items():
            gradient = p.grad.to(gradients)
            named[name] = p.detach()
            if weights != gradients:
                named[name].grad_dtype = None
            named[name].grad = gradient
        before, left = copies_of_values(named), after_agc(named)
        result = clip.AGC(0.3).apply_(named.items())
        assert result.norm.item() == pytest.approx(norm_of(left), rel=1e-6) and not result.skipped
        tolerance = 4 * torch.finfo(gradients).eps
        for name, p in named.items():
            assert torch.equal(p, before[name]), "the weights are only read"
            torch.testing.assert_close(p.grad.double(), left[name], rtol=tolerance, atol=tolerance * 1e-3)


def copies_of_values(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in named.items()}


def test_refusals() -> None:
    for make in (
        lambda: clip.AGC(clipping=0),
        lambda: clip.AGC(eps=0.0),
        lambda: clip.AGC(exclude="head"),
        lambda: clip.Chain(clip.GlobalNorm(1.0), clip.AGC()),
        lambda: clip.Chain(clip.AGC(), clip.Value(1.0)),
        lambda: clip.Chain(clip.AGC(), clip.AGC(0.1)),
    ):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="norm_type"):
        clip.Chain(clip.AGC(), clip.GlobalNorm(1.0, norm_type=math.inf))
    weight = torch.ones(2, 2)
    weight.grad = torch.ones(2, 2)
    optimizer = gradfast.SGD([weight], lr=1.0, clip=clip.AGC())
    optimizer.norm_type = 1.0
    with pytest.raises(ValueError, match="norm_type=2"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_pickled_and_loaded() -> None:
    named = tensors(SHAPES)
    optimizer = gradfast.SGD(list(named.items()), lr=1.0, momentum=0.9, clip=clip.AGC(0.3))
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    of_twin = dict(zip(named, twin.param_groups[0]["params"]))
    for name, p in of_twin.items():
        p.grad = named[name].grad.clone()
    before = copies(named)
    optimizer.step()
    twin.step()
    for name, p in of_twin.items():
        assert torch.equal(p, named[name])
    assert not torch.equal(named["head.weight"], before["head.weight"])
