"""The rules of the policies alone, norm by norm, against float64 oracles and published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clip import policy_oracles as oracles

from gradfast import clip
from gradfast._load import native

PAIRS = {
    "global norm": (clip.GlobalNorm(0.7), lambda: oracles.GlobalNorm(0.7)),
    "skip spikes, exact": (clip.SkipSpikes(exact=True), oracles.SkipSpikes),
    "skip spikes": (clip.SkipSpikes(), lambda: oracles.SkipSpikes(exact=False)),
    "skip spikes, short": (clip.SkipSpikes(3.0, 5), lambda: oracles.SkipSpikes(3.0, 5, exact=False)),
    "zclip": (clip.ZClip(), oracles.ZClip),
    "zclip, short": (clip.ZClip(2.0, 0.9, 3), lambda: oracles.ZClip(2.0, 0.9, 3)),
    "auto clip": (clip.AutoClip(), oracles.AutoClip),
    "auto clip, short": (clip.AutoClip(37.5, 7), lambda: oracles.AutoClip(37.5, 7)),
    "auto clip, 0": (clip.AutoClip(0, 20), lambda: oracles.AutoClip(0, 20)),
    "auto clip, 100": (clip.AutoClip(100, 20), lambda: oracles.AutoClip(100, 20)),
    "chain": (
        clip.Chain(clip.SkipSpikes(6.0, 32), clip.ZClip(), clip.AutoClip(50, 40), clip.GlobalNorm(0.9)),
        lambda: oracles.Chain(
            oracles.SkipSpikes(6.0, 32, exact=False), oracles.ZClip(), oracles.AutoClip(50, 40), oracles.GlobalNorm(0.9)
        ),
    ),
}


def norms_of(seed: int, steps: int = 3000) -> np.ndarray:
    """A run's norms: falling, noisy, repeated values, and after the warm-up spikes and norms that are not finite."""
    generator = np.random.default_rng(seed)
    norms = (1 + 3 * np.exp(-np.arange(steps) / 300)) * generator.lognormal(0, 0.2, steps)
    norms[100:] = np.where(
        generator.random(steps - 100) < 0.01, norms[100:] * 10 ** generator.uniform(1, 6), norms[100:]
    )
    norms[generator.random(steps) < 0.2] = 1.25
    norms[generator.random(steps) < 0.01] = 0.0
    for bad in (np.nan, np.inf):
        norms[generator.random(steps) < 0.01] = bad
    return norms


class Ours:
    """A policy's rule on the host, with its state."""

    def __init__(self, policy: clip.Policy) -> None:
        self.chain = native.PolicyChain(policy.program(1))
        self.state = torch.zeros(self.chain.state_size, dtype=torch.float64)

    def run(self, norms) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        norms = torch.as_tensor(np.asarray(norms, dtype=np.float64))
        return tuple(result.numpy() for result in self.chain.run(self.state, norms))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_follows_the_paper_over_a_run(name: str, seed: int) -> None:
    policy, make_oracle = PAIRS[name]
    norms = norms_of(seed)
    oracle = make_oracle()
    expected = [oracle.step(norm) for norm in norms]
    coefficients, _, _, skipped = Ours(policy).run(norms)
    finite = np.isfinite(norms)  # what to do with the others is not for the policies to say
    np.testing.assert_array_equal(skipped[finite], np.array([skip for _, skip in expected])[finite])
    # A hundred sums of a window in another order: relative errors of 1e-13, a bit more after 3000 steps of a mean.
    np.testing.assert_allclose(coefficients[finite], np.array([factor for factor, _ in expected])[finite], rtol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_resumes_to_the_bit(name: str) -> None:
    policy, _ = PAIRS[name]
    norms = norms_of(3, 400)
    whole, halves = Ours(policy), Ours(policy)
    expected = whole.run(norms)
    first = halves.run(norms[:217])
    resumed = Ours(policy)
    resumed.state = halves.state.clone()
    second = resumed.run(norms[217:])
    for all_steps, before, after in zip(expected, first, second, strict=True):
        np.testing.assert_array_equal(all_steps, np.concatenate([before, after]))
    assert torch.equal(whole.state, resumed.state)


@pytest.mark.parametrize("name", PAIRS)
def test_norms_that_are_not_finite_or_zero_leave_no_trace(name: str) -> None:
    policy, _ = PAIRS[name]
    norms = norms_of(4, 300)
    norms = norms[np.isfinite(norms) & (norms > 0)]
    clean, dirty = Ours(policy), Ours(policy)
    bad = [np.nan, 0.0, np.inf, -np.inf, 0.0, np.nan, 1e200, np.inf, 0.0]
    with_bad = np.insert(norms, [0, 0, 5, 5, 5, 70, 200, 200, 220], bad)
    clean.run(norms)
    dirty.run(with_bad)
    assert torch.equal(clean.state, dirty.state)
    assert torch.isfinite(clean.state).all()


@pytest.mark.parametrize("name", PAIRS)
def test_one_sample_and_zeros(name: str) -> None:
    """A run that begins with hundreds of zeros, a lost loss or an output that starts at 0, goes on as any other."""
    policy, make_oracle = PAIRS[name]
    coefficients, _, _, skipped = Ours(policy).run([0.5])
    assert coefficients[0] == pytest.approx(1.0, abs=3e-6)
    assert not skipped[0]
    ours = Ours(policy)
    coefficients, _, _, skipped = ours.run(np.zeros(300))
    assert (coefficients == 1).all()
    assert not skipped.any()
    assert not ours.state.any()
    norms = np.random.default_rng(6).normal(1.0, 0.05, 300)
    coefficients, _, _, skipped = ours.run(norms)
    oracle = make_oracle()
    expected = [oracle.step(norm) for norm in norms]
    np.testing.assert_allclose(coefficients, [factor for factor, _ in expected], rtol=1e-9)
    assert list(skipped) == [skip for _, skip in expected]


@pytest.mark.parametrize("name", ["skip spikes", "skip spikes, exact", "zclip", "auto clip, short", "chain"])
def test_a_million_samples(name: str) -> None:
    """No error adds up: the state at the end is that of an object that saw the last few thousand only."""
    policy, make_oracle = PAIRS[name]
    norms = np.random.default_rng(5).lognormal(0, 0.1, 1_000_000)
    long, short = Ours(policy), Ours(policy)
    coefficients, limits, _, _ = long.run(norms)
    last, last_limits, _, _ = short.run(norms[-5000:])
    np.testing.assert_allclose(coefficients[-1000:], last[-1000:], rtol=1e-12)
    np.testing.assert_allclose(limits[-1000:], last_limits[-1000:], rtol=1e-12)
    oracle = make_oracle()
    for norm in norms[-5000:]:
        expected, _ = oracle.step(norm)
    assert coefficients[-1] == pytest.approx(expected, rel=1e-9)


# ---- numbers from the papers, and worked by hand ----------------------------------------


def test_zclip_by_hand() -> None:
    """Warm-up of 1 and 3: mean 2, variance 1. Then 7: z = 5, limit = 2 + 2.5 / (5 / 2.5) = 3.25."""
    ours = Ours(clip.ZClip(warmup=2))
    coefficients, limits, deciders, _ = ours.run([1.0, 3.0, 7.0])
    assert limits[2] == pytest.approx(3.25, rel=1e-5)
    assert coefficients[2] == pytest.approx(3.25 / 7, rel=1e-5)
    assert list(deciders) == [-1, -1, 0]
    mean = 0.97 * 2 + 0.03 * 3.25
    variance = 0.97 * 1 + 0.03 * (3.25 - mean) ** 2
    _, limits, _, _ = ours.run([9.0])
    z = (9 - mean) / np.sqrt(variance)
    assert limits[0] == pytest.approx(mean + 2.5 * np.sqrt(variance) / (z / 2.5), rel=1e-5)


def test_auto_clip_by_hand() -> None:
    """Percentile 10 of 1..k is 1 + 0.1 (k - 1), as numpy.percentile of the reference implementation gives."""
    _, limits, _, _ = Ours(clip.AutoClip(10, window=100)).run(np.arange(1.0, 51.0))
    clipped = np.isfinite(limits)
    np.testing.assert_allclose(limits[clipped], (1 + 0.1 * np.arange(50))[clipped], rtol=1e-14)
    assert clipped[1:].all()


def test_skip_spikes_by_hand() -> None:
    """64 norms, half 1 and half 3: mean 2, sd sqrt(64/63). The limit at 6 sd is 8.0473."""
    base = np.tile([1.0, 3.0], 32)
    limit = 2 + 6 * np.sqrt(64 / 63)
    for norm, skip in ((limit - 1e-9, False), (limit + 1e-9, True)):
        _, _, _, skipped = Ours(clip.SkipSpikes()).run([*base, norm])
        assert skipped[-1] == skip
        assert not skipped[:-1].any()
    for before, skip in ((62, False), (63, True)):
        _, _, _, skipped = Ours(clip.SkipSpikes()).run([*base[:before], 1e6])
        assert skipped[-1] == skip, "OLMo judges by half a window, the step's own norm counted"


# ---- where the published rules fail, and ours must not ----------------------------------------


def test_zclip_survives_a_spike_in_its_warm_up() -> None:
    """The published code lets 1000 pass, and then 480 for hundreds of steps."""
    norms = np.random.default_rng(0).normal(1.0, 0.05, 200)
    norms[12] = 1000.0
    norms[60] = 20.0
    coefficients, _, _, _ = Ours(clip.ZClip()).run(norms)
    assert norms[12] * coefficients[12] < 3
    assert norms[60] * coefficients[60] < 1.5
    published = oracles.ZClip()
    assert min(published.step(norm)[0] for norm in norms) == 1.0, "the published rule would have clipped nothing"


def test_zclip_survives_a_spike_before_it_can_know() -> None:
    """A spike among the first five norms passes, but does not stay in the statistics."""
    norms = np.random.default_rng(0).normal(1.0, 0.05, 100)
    norms[1] = 1000.0
    norms[50] = 20.0
    coefficients, _, _, _ = Ours(clip.ZClip()).run(norms)
    assert norms[50] * coefficients[50] < 1.5


def test_a_spike_does_not_hide_the_next() -> None:
    norms = np.random.default_rng(1).normal(1.0, 0.05, 200)
    norms[[150, 152]] = 1000.0, 400.0
    for exact, expected in ((False, [150, 152]), (True, [150])):
        _, _, _, skipped = Ours(clip.SkipSpikes(exact=exact)).run(norms)
        assert list(np.flatnonzero(skipped)) == expected


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("factor", [3.0, 100.0, 1e6])
def test_skip_spikes_goes_on_where_norms_stay_high(factor: float, spread: float) -> None:
    norms = np.random.default_rng(2).normal(1.0, spread, 600)
    norms[200:] *= factor
    _, _, _, skipped = Ours(clip.SkipSpikes()).run(norms)
    assert skipped[200]
    assert not skipped[400:].any(), f"skipped {skipped.sum()} steps"


def test_a_chain_ends_where_a_policy_skips() -> None:
    """The policy behind sees neither the spike nor a step."""
    alone, chained = Ours(clip.ZClip()), Ours(clip.Chain(clip.SkipSpikes(), clip.ZClip()))
    norms = np.random.default_rng(3).normal(1.0, 0.05, 200)
    norms[[100, 150]] = 50.0
    _, _, deciders, skipped = chained.run(norms)
    assert skipped.sum() == 2
    assert (deciders[skipped] == 0).all()
    alone.run(norms[~skipped])
    assert torch.equal(chained.state[-alone.state.numel() :], alone.state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip.GlobalNorm(0),
        lambda: clip.GlobalNorm(float("nan")),
        lambda: clip.GlobalNorm(1.0, 0.5),
        lambda: clip.SkipSpikes(sigmas=-1),
        lambda: clip.SkipSpikes(window=1),
        lambda: clip.ZClip(alpha=1.0),
        lambda: clip.ZClip(warmup=2.5),
        lambda: clip.AutoClip(percentile=101),
        lambda: clip.AutoClip(window=0),
        lambda: clip.Chain(),
        lambda: clip.Chain(*[clip.ZClip()] * 5),
        lambda: clip.Chain(clip.GlobalNorm(1.0), clip.GlobalNorm(1.0, float("inf"))),
    ],
)
def test_settings_that_make_no_sense(make) -> None:
    with pytest.raises(ValueError):
        make()
