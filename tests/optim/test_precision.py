"""16-bit parameters: fp32 masters, rounding by chance, states of their own dtype, and their checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import gradfast

NARROW = [torch.bfloat16, torch.float16]
OPTIMIZERS = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Lion", {"lr": 0.001}),
]
SHAPES = [(), (1,), (513,), (16, 3), (70_001,), (0,)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def give_gradients(to: list[Tensor], step: int, dtype: torch.dtype) -> None:
    """The same values for every dtype of parameters: random ones, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(50 + step)
    for parameter in to:
        gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.grad = gradient.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, to: list[Tensor], dtype: torch.dtype, steps: range) -> None:
    for step in steps:
        give_gradients(to, step, dtype)
        optimizer.step()


def assert_same(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---- masters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_masters_are_the_float32_run_and_parameters_their_rounding(
    name: str, options: dict, dtype: torch.dtype
) -> None:
    ours = parameters(dtype)
    full = [p.detach().float().requires_grad_() for p in ours]
    optimizer = getattr(gradfast, name)(ours, max_norm=1.0, master_weights=True, **options)
    reference = getattr(gradfast, name)(full, max_norm=1.0, **options)
    for step in range(6):
        train(optimizer, ours, dtype, range(step, step + 1))
        train(reference, full, dtype, range(step, step + 1))
        assert torch.equal(optimizer.grad_norm, reference.grad_norm)
        for mine, other in zip(ours, full, strict=True):
            state = optimizer.state[mine]
            assert state["master_param"].dtype == torch.float32
            assert_same(state["master_param"], other.detach())
            assert_same(mine.detach(), other.detach().to(dtype))
            for key, value in reference.state[other].items():
                assert_same(state[key], value)


def test_masters_keep_what_sixteen_bits_lose() -> None:
    """A thousand updates of 2^-12: each is below half a unit (2^-8) of bf16's 1.0; together they are 0.244."""
    results = {}
    for master in (False, True):
        parameter = torch.ones(10, dtype=torch.bfloat16)
        parameter.grad = torch.ones_like(parameter)
        optimizer = gradfast.SGD([parameter], lr=2.0**-12, master_weights=master)
        for _ in range(1000):
            optimizer.step()
        results[master] = parameter[0].item()
    assert results[False] == 1.0
    assert results[True] == torch.tensor(1 - 1000 * 2.0**-12).bfloat16().item()


def test_masters_only_where_the_parameter_is_narrow() -> None:
    """As mixed models need it: norms in fp32 beside bf16 weights, in one optimiser."""
    narrow, full, double = (torch.ones(5, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float64))
    for parameter in (narrow, full, double):
        parameter.grad = torch.ones_like(parameter)
    optimizer = gradfast.AdamW([narrow, full, double], lr=0.1, master_weights=True)
    optimizer.step()
    assert "master_param" in optimizer.state[narrow]
    assert "master_param" not in optimizer.state[full]
    assert "master_param" not in optimizer.state[double]
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.float32
    assert optimizer.state[double]["exp_avg"].dtype == torch.float64
    torch.testing.assert_close(optimizer.state[narrow]["master_param"], full, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}])
def test_layouts(dtype: torch.dtype, options: dict) -> None:
    """Transposed and expanded gradients, a view with gaps: the same result as with everything contiguous."""
    plain = parameters(dtype, [(40, 30), (40, 30), (6, 8)])
    gapped = torch.zeros(6, 16, dtype=dtype)
    views = [plain[0].detach().clone(), plain[1].detach().clone(), gapped[:, ::2]]
    views[2].copy_(plain[2].detach())
    gradient = torch.randn(40, 30).to(dtype)
    row = torch.randn(30).to(dtype)
    last = torch.randn(6, 8).to(dtype)
    plain[0].grad, views[0].grad = gradient, gradient.t().contiguous().t()
    plain[1].grad, views[1].grad = row.expand(40, 30).contiguous(), row.expand(40, 30)
    plain[2].grad, views[2].grad = last, last.clone()
    optimizers = [gradfast.AdamW(each, lr=0.01, max_norm=1.0, **options) for each in (plain, views)]
    for optimizer in optimizers:
        for _ in range(3):
            optimizer.step()
    for mine, other in zip(plain, views, strict=True):
        assert_same(mine.detach(), other)
    assert not gapped[:, 1::2].any()


def test_a_changed_parameter_is_taken_over_by_its_master() -> None:
    """Weights that are loaded or set after the first step count; where nothing changed, the master keeps its bits."""
    parameter = torch.ones(4, dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, 2.0**-12)
    optimizer = gradfast.SGD([parameter], lr=1.0, master_weights=True)
    optimizer.step()
    with torch.no_grad():
        parameter[1] = 5.0
    optimizer.step()
    assert optimizer.state[parameter]["master_param"].tolist() == [1 - 2.0**-11, 5 - 2.0**-12] + [1 - 2.0**-11] * 2


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, gradfast.GradScaler])
def test_pure_fp16_training_with_masters_under_a_scaler(kind: type) -> None:
    """torch's scaler refuses to unscale fp16 gradients in place; in the step they are unscaled as they are widened."""
    parameter = torch.ones(1000, dtype=torch.float16)
    optimizer = gradfast.AdamW([parameter], lr=0.01, master_weights=True, max_norm=1.0)
    scaler = kind("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))
    before = None
    for event in (math.inf, 1.0, math.nan, 1.0):
        parameter.grad = torch.full_like(parameter, event)
        if event != 1.0 and before is not None:
            before = copy.deepcopy((parameter, optimizer.state_dict()["state"]))
        scaler.step(optimizer)
        scaler.update()
        if event != 1.0 and before is not None:
            assert_same((parameter, optimizer.state_dict()["state"]), before)
        before = ()
    assert optimizer.state[parameter]["step"].item() == 2.0
    assert scaler.get_scale() == 256.0


# ---- rounding by chance --------------------------------------------------------------------------------------------


def rounded(value: float, dtype: torch.dtype, count: int = 1_000_000, seed: int = 0) -> Tensor:
    """`count` parameters of zero after a step of plain SGD that adds `value` to each, as float64."""
    parameter = torch.zeros(count, dtype=dtype)
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((count,), -value)
    gradfast.SGD([parameter], lr=1.0, stochastic_rounding=True, rounding_seed=seed).step()
    return parameter.double()


VALUES = {
    torch.bfloat16: [1.0 + 2.0**-9, -3.3, 1e-30, 1e-40, 2.0**-133 * 1.3, 1e38],
    torch.float16: [1.0 + 2.0**-12, -3.3, 1e-3, 3e-6, 2.0**-24 * 0.3, 60001.0],
}


@pytest.mark.parametrize(("dtype", "value"), [(dtype, value) for dtype, values in VALUES.items() for value in values])
def test_rounding_is_unbiased_with_the_least_variance(dtype: torch.dtype, value: float) -> None:
    """Only the two neighbours occur, the upper in a share f of n = 10^6 cases: the mean is within 5 standard errors.

    f is the distance from the lower neighbour in units of the gap, and the number of upper ones is binomial: standard
    deviation sqrt(n f (1 - f)). Five of them are exceeded in one of 1.7 million tests. The generator is seeded.
    """
    exact = torch.tensor(value, dtype=torch.float32).double().item()  # what float32 makes of it
    found = rounded(value, dtype)
    neighbours = found.unique()
    assert len(neighbours) <= 2
    low, high = neighbours.min().item(), neighbours.max().item()
    if low == high:
        assert low == exact
        return
    nearest = torch.tensor(exact).to(dtype)
    toward = torch.tensor(math.inf if nearest.item() < exact else -math.inf, dtype=dtype)
    assert {low, high} == {nearest.double().item(), torch.nextafter(nearest, toward).double().item()}
    fraction, count = (exact - low) / (high - low), len(found)
    error = math.sqrt(fraction * (1 - fraction) / count)
    assert abs((found.mean().item() - exact) / (high - low)) < 5 * error + 2.0**-17
    variance = found.var().item() / (high - low) ** 2
    # The variance of a sample's variance of a two-valued variable: f (1 - f) (1 - 2 f)^2 / n, to first order.
    spread = math.sqrt(fraction * (1 - fraction) / count) * abs(1 - 2 * fraction) + 1 / count
    assert abs(variance - fraction * (1 - fraction)) < 6 * spread + 2.0**-17


@pytest.mark.parametrize("dtype", NARROW)
def test_many_tiny_updates_are_not_lost(dtype: torch.dtype) -> None:
    """256 updates of 1/256 unit: a random walk whose mean over n = 100,000 elements is one unit, within 5 errors."""
    count, steps = 100_000, 256
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    parameter = torch.full((count,), 1.5, dtype=dtype)
    parameter.grad = torch.full_like(parameter, -unit / steps)
    optimizer = gradfast.SGD([parameter], lr=1.0, stochastic_rounding=True)
    for _ in range(steps):
        optimizer.step()
    moved = (parameter.double() - 1.5) / unit
    variance = steps * (1 / steps) * (1 - 1 / steps)
    assert abs(moved.mean().item() - 1) < 5 * math.sqrt(variance / count)
    assert abs(moved.var().item() - variance) < 0.1  # that of a Poisson-like count of ups
    nearest = torch.full((count,), 1.5, dtype=dtype)
    nearest.grad = torch.full_like(nearest, -unit / steps)
    plain = gradfast.SGD([nearest], lr=1.0)
    for _ in range(steps):
        plain.step()
    assert nearest.unique().item() == 1.5  # to nearest, all of it is lost


def test_random_bits_of_elements_steps_parameters_and_seeds_are_independent() -> None:
    """Correlations of a million ups and downs stay within 5 / sqrt(n)."""
    count = 1_000_000

    def ups(seed: int) -> list[Tensor]:
        pair = [torch.zeros(count, dtype=torch.bfloat16) for _ in range(2)]
        optimizer = gradfast.SGD(pair, lr=1.0, stochastic_rounding=True, rounding_seed=seed)
        seen = []
        for _ in range(2):
            for parameter in pair:
                parameter.zero_()
                parameter.grad_dtype = torch.float32
                parameter.grad = torch.full((count,), -(1.0 + 2.0**-8))  # halfway
            optimizer.step()
            seen += [(p.double() > 1.0).double() * 2 - 1 for p in pair]
        return seen

    series = ups(0) + ups(1)
    bound = 5 / math.sqrt(count)
    for i, left in enumerate(series):
        assert abs(left.mean().item()) < bound
        for lag in (1, 2, 3, 4, 8, 512):
            assert abs((left[lag:] * left[:-lag]).mean().item()) < bound
        for right in series[:i]:
            assert abs((left * right).mean().item()) < bound


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}])
@pytest.mark.parametrize("dtype", NARROW)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype: torch.dtype, options: dict) -> None:
    """One thread or three; alone the tensor is one of few chunks, before others it is cut into tasks differently."""
    results = []
    threads = torch.get_num_threads()
    for count, others in ((1, 0), (3, 0), (3, 5)):
        torch.set_num_threads(count)
        ours = parameters(dtype, [(200_001,)] + [(3000 + i,) for i in range(others)])
        optimizer = gradfast.AdamW(ours, lr=0.01, rounding_seed=7, **options)
        train(optimizer, ours, dtype, range(4))
        results.append([ours[0].detach(), optimizer.state[ours[0]]["exp_avg_sq"]])
    torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    again = parameters(dtype, [(200_001,)])
    train(gradfast.AdamW(again, lr=0.01, rounding_seed=8, **options), again, dtype, range(4))
    if "stochastic_rounding" in options:
        assert not torch.equal(again[0], results[0][0])


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of n counters, [n, 4] of uint32, written anew from the paper."""
    low = np.uint64(0xFFFFFFFF)
    c = counter.astype(np.uint64)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[:, 0], np.uint64(0xCD9E8D57) * c[:, 2]
        c = np.stack(
            [(b >> np.uint64(32)) ^ c[:, 1] ^ key[0], b & low, (a >> np.uint64(32)) ^ c[:, 3] ^ key[1], a & low], 1
        )
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c.astype(np.uint32)


@pytest.mark.parametrize("dtype", NARROW)
def test_bits_are_those_of_seed_step_parameter_and_element(dtype: torch.dtype) -> None:
    """From zero with lr = 1 the exact result is -g; each element must go the way that its own 16 bits say.

    The kernels for CUDA are held to the same function by tests/device/test_mixed.cpp.
    """
    zeros = philox(np.zeros((1, 4), np.uint32), 0)
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]  # published with the generator
    count, seed, number, steps = 10_007, 0x123456789ABCDEF, 1, 3
    other, parameter = torch.zeros(5, dtype=dtype), torch.zeros(count, dtype=dtype)
    optimizer = gradfast.SGD([other, parameter], lr=1.0, stochastic_rounding=True, rounding_seed=seed)
    exponents = torch.linspace(-26 if dtype == torch.float16 else -140, 12, count)
    for step in range(steps):
        exact = torch.randn(count) * torch.exp2(exponents)
        parameter.zero_()
        for each, gradient in ((other, torch.ones(5)), (parameter, -exact)):
            each.grad_dtype = torch.float32
            each.grad = gradient
        optimizer.step()
        element = np.arange(count)
        counter = np.stack([element // 4, 0 * element, 0 * element + step, 0 * element + number], 1).astype(np.uint32)
        words = philox(counter, seed)[element, element % 4] & 0xFFFF
        # The neighbours of the magnitude, and how far along it lies, all exact in float64.
        magnitude = exact.double().abs()
        nearest = magnitude.to(dtype)
        below = torch.where(nearest.double() > magnitude, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
        above = torch.nextafter(below, torch.full_like(below, math.inf)).double()
        share = ((magnitude - below.double()) / (above - below.double())).numpy()
        if dtype == torch.bfloat16:
            up = words + share * 65536 >= 65536
        else:
            subnormal = (magnitude < 2.0**-14).numpy()
            up = np.where(subnormal, share > (words + 0.5) / 65536, words // 8 + share * 8192 >= 8192)
        expected = torch.where(torch.from_numpy(up), above, below.double()).copysign(exact.double())
        assert_same(parameter.double(), expected)


def test_nothing_finite_becomes_infinite_by_chance() -> None:
    for dtype, value in ((torch.float16, 65_504.0), (torch.bfloat16, torch.finfo(torch.bfloat16).max)):
        assert rounded(value, dtype, 10_000).unique().item() == value
    assert rounded(65_519.0, torch.float16, 10_000).unique().item() == 65_504.0  # as to nearest
    assert rounded(65_520.0, torch.float16, 100).unique().item() == math.inf


# ---- states ----------------------------------------------------------------------------------------------------------


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


def test_float32_gradients_of_a_bf16_parameter() -> None:
    """As FSDP and Megatron accumulate them; torch permits it where `grad_dtype` says so."""
    parameter = torch.ones(600, dtype=torch.bfloat16)
    parameter.grad_dtype = torch.float32
    parameter.grad = exact = torch.linspace(-1, 1, 600)
    optimizer = gradfast.SGD([parameter], lr=1.0, momentum=0.9, master_weights=True, max_norm=1e9)
    optimizer.step()
    assert_same(optimizer.state[parameter]["master_param"], 1 - exact)
    torch.testing.assert_close(optimizer.grad_norm, exact.norm(), rtol=2.0**-22, atol=0)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

KEPT = [
    {"master_weights": True},
    {"stochastic_rounding": True},
    {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    {"master_weights": True, "state_dtype": torch.bfloat16},
    {"state_dtype": torch.float32},
]


@pytest.mark.parametrize("options", KEPT)
@pytest.mark.parametrize(("name", "extra"), OPTIMIZERS)
def test_resumed_run_is_the_uninterrupted_one(name: str, extra: dict, options: dict) -> None:
    straight = parameters(torch.bfloat16)
    uninterrupted = getattr(gradfast, name)(straight, **extra, **options)
    train(uninterrupted, straight, torch.bfloat16, range(6))

    first = parameters(torch.bfloat16)
    before = getattr(gradfast, name)(first, **extra, **options)
    train(before, first, torch.bfloat16, range(3))
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in first], "optimizer": before.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    for entries in checkpoint["optimizer"]["state"].values():
        assert all(value is None or value.dtype == torch.float32 for value in entries.values())
    second = [p.requires_grad_() for p in checkpoint["model"]]
    after = getattr(gradfast, name)(second, **{**extra, "lr": 9.0}, **options)
    after.load_state_dict(checkpoint["optimizer"])
    train(after, second, torch.bfloat16, range(3, 6))
    for mine, other in zip(second, straight, strict=True):
        assert_same(mine.detach(), other.detach())
        assert_same(dict(after.state[mine]), dict(uninterrupted.state[other]))
    for clone in (copy.deepcopy(uninterrupted), pickle.loads(pickle.dumps(uninterrupted))):
        assert clone.precision == uninterrupted.precision


@pytest.mark.parametrize("options", KEPT)
@pytest.mark.parametrize(("name", "extra"), [(n, e) for n, e in OPTIMIZERS if n != "Lion"])
def test_checkpoints_go_to_torch_and_back(name: str, extra: dict, options: dict) -> None:
    ours = parameters(torch.bfloat16)
    optimizer = getattr(gradfast, name)(ours, **extra, **options)
    train(optimizer, ours, torch.bfloat16, range(3))
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    foreign = getattr(torch.optim, name)(theirs, **extra)
    foreign.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(foreign, theirs, torch.bfloat16, range(3, 4))  # torch goes on in bf16
    back = [p.detach().clone().requires_grad_() for p in theirs]
    again = getattr(gradfast, name)(back, **extra, **options)
    again.load_state_dict(copy.deepcopy(foreign.state_dict()))
    for mine, other in zip(back, theirs, strict=True):
        for key, value in foreign.state[other].items():
            if key != "master_param" and torch.is_tensor(value):
                assert_same(again.state[mine][key].float(), value.float())
    train(again, back, torch.bfloat16, range(4, 5))


def test_a_torch_checkpoint_resumes_with_masters_made_of_the_parameters() -> None:
    theirs = parameters(torch.bfloat16)
    foreign = torch.optim.AdamW(theirs, lr=0.01)
    train(foreign, theirs, torch.bfloat16, range(3))
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    optimizer.load_state_dict(copy.deepcopy(foreign.state_dict()))
    full = [p.detach().float() for p in ours]
    reference = torch.optim.AdamW(full, lr=0.01, foreach=False)
    reference.load_state_dict(copy.deepcopy(foreign.state_dict()))
    train(optimizer, ours, torch.bfloat16, range(3, 6))
    train(reference, full, torch.bfloat16, range(3, 6))
    for mine, other in zip(ours, full, strict=True):
        torch.testing.assert_close(optimizer.state[mine]["master_param"], other, rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize("options", KEPT)
def test_a_torch_optimizer_is_turned_into_ours_with_its_states_in_their_new_dtype(options: dict) -> None:
    ours = parameters(torch.bfloat16)
    foreign = torch.optim.SGD(ours, lr=0.05, momentum=0.9)
    train(foreign, ours, torch.bfloat16, range(3))
    before = [foreign.state[p]["momentum_buffer"].clone() for p in ours]
    optimizer = gradfast.from_torch(foreign, max_norm=None, **options)
    give_gradients(ours, 3, torch.bfloat16)
    optimizer.step()
    for parameter, momentum in zip(ours, before, strict=True):
        found = optimizer.state[parameter]["momentum_buffer"]
        assert found.dtype == options.get("state_dtype", torch.float32)
        exact = 0.9 * momentum.double() + parameter.grad.double()
        unit = 2.0**-7 if found.dtype == torch.bfloat16 else 2.0**-22
        torch.testing.assert_close(found.double(), exact, rtol=unit, atol=unit)


def test_without_the_option_a_checkpoint_with_masters_leaves_none_behind() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    train(optimizer, ours, torch.bfloat16, range(2))
    plain = gradfast.AdamW(ours, lr=0.01)
    plain.load_state_dict(optimizer.state_dict())
    assert all("master_param" not in entries for entries in plain.state.values())
    assert plain.state[ours[2]]["exp_avg"].dtype == torch.bfloat16
    train(plain, ours, torch.bfloat16, range(2, 3))


def test_momentum_that_no_step_has_filled_is_saved_as_none() -> None:
    """So that dampening starts with the first update, in torch as here."""
    parameter = torch.ones(3, dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, math.nan)
    optimizer = gradfast.SGD(
        [parameter], lr=1.0, momentum=0.9, dampening=0.5, state_dtype=torch.bfloat16, nonfinite="skip"
    )
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["momentum_buffer"] is None


def test_users_hooks_see_the_finished_state() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = gradfast.AdamW(ours, lr=0.01, master_weights=True)
    train(optimizer, ours, torch.bfloat16, range(1))
    saved = optimizer.state_dict()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": dict(given["state"])})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[ours[2]]["exp_avg"].dtype))
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32]


# ---- errors ----------------------------------------------------------------------------------------------------------


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
