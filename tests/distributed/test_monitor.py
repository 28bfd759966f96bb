"""The monitor on sharded models: numbers of whole parameters, the same on all ranks, written by the first."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from distributed.alone import assert_same_on_all_ranks, assert_same_parameters, batches, loss_of, model
from distributed.ranks import on_ranks, shared_folder
from distributed.test_fsdp2 import my_part, sharded
from torch.distributed.tensor.debug import CommDebugMode

import gradfast
from gradfast import clip
from gradfast.monitor import CSV, JSONL, Monitor

POLICIES: dict[str, Any] = {
    "norm": {"max_norm": 0.05},
    "parameter": {"clip": clip.PerParameterNorm(0.2)},
    "ada_gc": {"clip": clip.AdaGC(warmup=2, beta=0.5, ratio=0.9)},
    "value": {"clip": clip.Value(0.05)},
    "agc": {"clip": clip.AGC(0.02, vectors=False)},
}


def run(module: torch.nn.Module, alone: bool, kind: Any = gradfast.SGD, **options: Any) -> Monitor:
    optimizer = kind(module.named_parameters(), lr=0.05, momentum=0.9, **options)
    monitor = Monitor(optimizer, module, every=3)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_of(module, batch if alone else my_part(batch)).backward()
        optimizer.step()
    return monitor


def numbers(monitor: Monitor) -> torch.Tensor:
    names = ("grad", "clipped", "param", "update", "bad", "clipped_units")
    rows = [monitor.last[name] for name in names if name in monitor.last]
    return torch.tensor(rows, dtype=torch.float64)


@on_ranks(2, 4)
@pytest.mark.parametrize("name", list(POLICIES))
def test_numbers_are_those_of_one_process(name: str) -> None:
    expected = numbers(run(model(), alone=True, **POLICIES[name]))
    found = numbers(run(sharded(model()), alone=False, **POLICIES[name]))
    assert_same_on_all_ranks(found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (expected[1] < expected[0]).any()  # something was clipped


@on_ranks(2)
def test_of_torch_optimisers_too() -> None:
    expected = run(model(), alone=True, kind=torch.optim.SGD)
    found = run(sharded(model()), alone=False, kind=torch.optim.SGD)
    kept = [0, 2, 3]  # what clipping left of a gradient is not known
    assert_same_on_all_ranks(numbers(found))
    torch.testing.assert_close(numbers(found)[kept], numbers(expected)[kept], rtol=1e-9, atol=1e-12)


@on_ranks(2)
def test_a_sample_takes_one_collective_and_other_steps_none() -> None:
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.05, max_norm=0.05)
    monitor = Monitor(optimizer, module, every=4)
    collectives = []
    for batch in batches(9):
        optimizer.zero_grad()
        loss_of(module, my_part(batch)).backward()
        with CommDebugMode() as counted:
            optimizer.step()
        collectives.append(counted.get_total_counts())
    assert collectives == [2, 1, 1, 2, 1, 1, 1, 2, 1]  # one is the norm's
    monitor.close()


@on_ranks(2)
def test_the_first_rank_writes() -> None:
    folder = shared_folder()
    torch.distributed.barrier()
    module = sharded(model())
    optimizer = gradfast.SGD(module.named_parameters(), lr=0.05, max_norm=0.05)
    if torch.distributed.get_rank() == 0:  # the other opens its sinks later, and may not empty the table
        monitor = Monitor(optimizer, module, every=1, sinks=[CSV(folder / "m.csv"), JSONL(folder)])
    for number, batch in enumerate(batches(3)):
        if torch.distributed.get_rank() == 1 and number == 0:
            monitor = Monitor(optimizer, module, every=1, sinks=[CSV(folder / "m.csv"), JSONL(folder)])
        loss_of(module, my_part(batch)).backward()
        optimizer.step()
    monitor.close()
    torch.distributed.barrier()
    assert len((folder / "m.csv").read_text().splitlines()) == 4
    lines = [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]


@on_ranks(2)
def test_a_bad_step_is_explained_and_leaves_the_model_as_it_was() -> None:
    """The forward pass that looks for the first bad layer gathers weights: none of them may stay and grow stale."""
    runs = []
    for watched in (True, False):
        module = sharded(model())
        optimizer = gradfast.SGD(module.named_parameters(), lr=0.05, momentum=0.9, max_norm=0.05)
        monitor = Monitor(optimizer, module, every=2) if watched else None
        for number, batch in enumerate(batches(6)):
            if number == 2:
                batch[1, 0] = math.inf  # on the first rank
            optimizer.zero_grad()
            loss_of(module, my_part(batch)).backward()
            optimizer.step()
        if monitor is not None:
            (event,) = monitor.events
            message = event.message
        runs.append({name: p.detach().full_tensor() for name, p in module.named_parameters()})
    assert_same_parameters(module, runs[0], rtol=0)
    if torch.distributed.get_rank() == 0:
        assert "the batch itself holds NaN or infinity" in message
    else:
        assert "backward" in message and "forward all is finite" in message
