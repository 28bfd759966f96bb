"""Statistics, bytes, shapes and the parts of the measurement that can be computed by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from gradfast.bench.environment import cpu_name
from gradfast.bench.launches import launch_calls
from gradfast.bench.memory import peak, peak_extra_bytes
from gradfast.bench.report import digits
from gradfast.bench.summary import summarise_ratios
from gradfast.bench.timing import CudaClock, Sample, interleave, middle
from gradfast.bench.traffic import floor_bytes
from gradfast.bench.workloads import WORKLOADS


def test_shapes_are_the_models() -> None:
    """The parameter counts of torchvision's ResNet50, of GPT-2 small, and of Llama 3.2 1B."""
    counts = {name: (len(workload.shapes), workload.elements) for name, workload in WORKLOADS.items()}
    assert counts == {
        "resnet50": (161, 25_557_032),
        "gpt2-124m": (148, 124_439_808),
        "llama-1b": (146, 1_235_814_400),
        "2000x512": (2000, 1_024_000),
        "small": (1000, 64_000),
        "flat": (1, 25_557_032),
    }


@pytest.mark.parametrize(("optimizer", "size", "bytes_each"), [("SGD", 4, 24), ("AdamW", 4, 32), ("Lion", 2, 12)])
def test_floor(optimizer: str, size: int, bytes_each: int) -> None:
    assert floor_bytes(optimizer, size, 1000) == 1000 * bytes_each


def test_ratios_of_three_processes() -> None:
    found = summarise_ratios([[0.5, 0.7, 0.6], [0.8, 0.9, 1.0, 1.1], [0.4]])
    # Medians 0.6, 0.95, 0.4. All eight in order: 0.4 0.5 0.6 0.7 0.8 0.9 1.0 1.1; quartiles at places 1.75 and 5.25.
    assert found == {
        "median": 0.6,
        "low": pytest.approx(0.575),
        "high": pytest.approx(0.925),
        "process_low": 0.4,
        "process_high": pytest.approx(0.95),
        "processes": 3,
        "pairs": 8,
    }
    assert summarise_ratios([[0.5]])["high"] == 0.5


def test_middle() -> None:
    assert middle([3.0, 1.0, 2.0]) == 2.0
    assert middle([4.0, 1.0, 2.0, 3.0]) == 2.5


class FakeClock:
    """A step "takes" what it returns."""

    def sample(self, step):
        value = step()
        return Sample(value, value)


def test_pairs_alternate_and_ratios_are_ours_over_theirs() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float):
        return lambda: order.append(name) or seconds

    pairs = interleave(FakeClock(), contender("ours", 1.0), contender("peer", 4.0), pairs=4, seconds=60)
    assert [pair.ratio for pair in pairs] == [0.25] * 4
    assert order[4:] == ["ours", "peer", "peer", "ours"] * 2  # after the warm-up


def test_pairs_end_when_the_time_is_up_but_not_before_five() -> None:
    counter = itertools.count(1)
    pairs = interleave(FakeClock(), lambda: float(next(counter)), lambda: 1.0, pairs=1000, seconds=1e-9)
    assert len(pairs) == 5


def test_peak_of_allocations() -> None:
    assert peak([10, 20, -10, 5, -25]) == 30
    assert peak([-5, 3]) == 0
    extra = peak_extra_bytes(torch.device("cpu"), lambda: torch.zeros(1000) + torch.zeros(1000))
    assert 12_000 <= extra < 14_000  # three arrays of 4000 bytes


def test_launches_are_told_from_copies_and_ranges() -> None:
    names = ["cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC"]
    others = ["cudaMemcpyAsync", "cudaMemsetAsync", "aten::add", "gradfast::step", "cudaDeviceSynchronize"]
    assert launch_calls([*names, *others]) == names


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00123456, "0.00123"), (1.2345, "1.23"), (123456.0, "123000"), (17.0, "17")]
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_cpu_name() -> None:
    assert cpu_name("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n") == "Some CPU @ 3 GHz"
    assert cpu_name("") != ""


def test_the_busy_wait_grows_until_it_hides_the_host() -> None:
    """A step of 3 ms of Python behind a wait of 0.2 ms: not hidden, so 6 ms, and then it is; that is kept."""
    clock = CudaClock.__new__(CudaClock)
    clock._wait = 2e-4
    waits: list[float] = []

    def attempt(step) -> Sample:
        waits.append(clock._wait)
        return Sample(device=1e-3, host=3e-3, host_hidden=clock._wait > 3e-3)

    clock._try = attempt
    assert clock.sample(lambda: None) == Sample(1e-3, 3e-3, True)
    assert clock.sample(lambda: None).host_hidden
    assert waits == [2e-4, 6e-3, 6e-3]


def test_a_host_that_cannot_be_hidden_is_told() -> None:
    clock = CudaClock.__new__(CudaClock)
    clock._wait = 2e-4
    clock._try = lambda step: Sample(device=1e-3, host=9.0, host_hidden=False)
    assert not clock.sample(lambda: None).host_hidden
    assert clock._wait == CudaClock.LONGEST_WAIT
