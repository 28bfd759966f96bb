"""Checkpoints of sharded optimisers: as torch's, saved on one number of ranks and loaded on another."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.alone import MAX_NORM, assert_same_parameters, batches, loss_of, model, train_alone, whole
from distributed.ranks import on_ranks, shared_folder
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gradfast
from gradfast import clip
from gradfast.optim import OptimizerState

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
}


def make(library: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model()
    fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    if library == "gradfast":
        return module, getattr(gradfast, name)(module.parameters(), max_norm=MAX_NORM, **OPTIONS[name])
    return module, getattr(torch.optim, name)(module.parameters(), **OPTIONS[name])


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: slice) -> None:
    for batch in batches()[steps]:
        optimizer.zero_grad()
        loss_of(module, batch.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]).backward()
        if type(optimizer).__module__.startswith("torch"):
            gradfast.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_states_are_as_torchs(name: str) -> None:
    ours, fast = make("gradfast", name)
    theirs, slow = make("torch", name)
    train(ours, fast, slice(2))
    train(theirs, slow, slice(2))
    for mine, other in zip(fast.state.values(), slow.state.values(), strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert isinstance(value, DTensor) == isinstance(other[key], DTensor), key
            torch.testing.assert_close(whole(value), whole(other[key]), rtol=1e-12, atol=1e-15)
            if isinstance(value, DTensor):
                assert value.placements == other[key].placements and value.device_mesh == other[key].device_mesh


PAIRS = [("gradfast", "gradfast"), ("gradfast", "torch"), ("torch", "gradfast")]


@on_ranks(2)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("write", "read"), PAIRS)
def test_state_dict_goes_on_in_the_other(name: str, write: str, read: str) -> None:
    _, expected, _ = train_alone(model(), name, **OPTIONS[name])
    before, optimizer = make(write, name)
    train(before, optimizer, slice(2))
    after, resumed = make(read, name)
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(after, resumed, slice(2, 4))
    assert_same_parameters(after, expected)


@on_ranks(4)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("write", "read"), PAIRS)
def test_saved_on_four_ranks_loaded_on_two(name: str, write: str, read: str) -> None:
    _, expected, _ = train_alone(model(), name, **OPTIONS[name])
    module, optimizer = make(write, name)
    train(module, optimizer, slice(2))
    states, optimizer_states = get_state_dict(module, optimizer)
    folder = shared_folder()
    dcp.save({"model": states, "optimizer": optimizer_states}, checkpoint_id=folder / "checkpoint")

    # From here on ranks 0 and 1 are one world, and 2 and 3 another that does the same.
    pair, rank = divmod(torch.distributed.get_rank(), 2)
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/pair{pair}", rank=rank, world_size=2)
    module, optimizer = make(read, name)
    states, optimizer_states = get_state_dict(module, optimizer)
    dcp.load({"model": states, "optimizer": optimizer_states}, checkpoint_id=folder / "checkpoint")
    set_state_dict(module, optimizer, model_state_dict=states, optim_state_dict=optimizer_states)
    train(module, optimizer, slice(2, 4))
    assert_same_parameters(module, expected)


@on_ranks(2)
def test_full_state_goes_to_one_process() -> None:
    """Gathered into whole tensors, as a checkpoint for one process; and from there back into shards."""
    _, expected, _ = train_alone(model(), "AdamW", **OPTIONS["AdamW"])
    module, optimizer = make("gradfast", "AdamW")
    train(module, optimizer, slice(2))
    full = StateDictOptions(full_state_dict=True)
    states = get_model_state_dict(module, options=full)
    optimizer_states = get_optimizer_state_dict(module, optimizer, options=full)

    alone = model()
    alone.load_state_dict(states)
    one = gradfast.AdamW(alone.parameters(), max_norm=MAX_NORM, **OPTIONS["AdamW"])
    set_optimizer_state_dict(alone, one, copy.deepcopy(optimizer_states), options=full)  # loading takes the tensors
    for batch in batches()[2:]:
        one.zero_grad()
        loss_of(alone, batch).backward()
        one.step()
    assert_same_parameters(alone, expected)

    again, resumed = make("gradfast", "AdamW")
    set_model_state_dict(again, states, options=full)
    set_optimizer_state_dict(again, resumed, optimizer_states, options=full)
    train(again, resumed, slice(2, 4))
    assert_same_parameters(again, expected)


CLIPS = {"of the norm": clip.Chain(clip.AutoClip(50, 4), clip.ZClip(warmup=2)), "AdaGC": clip.AdaGC(warmup=1, beta=0.5)}


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What gradfast logs in the block."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("gradfast")
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


@on_ranks(2)
@pytest.mark.parametrize("name", CLIPS)
def test_clip_policies_go_on_as_the_docs_say(name: str) -> None:
    """A run that is resumed half way ends as the one that was not, and nothing is warned of."""

    def fresh() -> tuple[nn.Module, gradfast.SGD]:
        module = model()
        fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
        return module, gradfast.SGD(module.parameters(), lr=0.1, momentum=0.9, clip=CLIPS[name])

    whole_run, optimizer = fresh()
    train(whole_run, optimizer, slice(4))
    expected = {key: whole(p) for key, p in whole_run.named_parameters()}

    module, optimizer = fresh()
    train(module, optimizer, slice(2))
    path = shared_folder() / "checkpoint"
    state = {"model": get_model_state_dict(module), "optimizer": OptimizerState(module, optimizer)}
    dcp.save(state, checkpoint_id=path)

    module, optimizer = fresh()
    state = {"model": get_model_state_dict(module), "optimizer": OptimizerState(module, optimizer)}
    with heard() as said:
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(module, state["model"])
    assert not said
    train(module, optimizer, slice(2, 4))
    assert_same_parameters(module, expected)


@on_ranks(2)
def test_without_the_policies_state_they_begin_anew_and_say_so() -> None:
    module = model()
    fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = gradfast.SGD(module.parameters(), lr=0.1, momentum=0.9, clip=CLIPS["AdaGC"])
    train(module, optimizer, slice(2))
    with heard() as said:
        set_optimizer_state_dict(module, optimizer, get_optimizer_state_dict(module, optimizer))
    assert len(said) == 1 and "begins anew: what is loaded says nothing of clip policies" in said[0]
    assert not optimizer.state_dict()["clip_state"]["values"].any()


@on_ranks(2)
def test_stages_of_a_pipeline_keep_their_own_parameters_memory() -> None:
    """Each rank's AdaGC remembers this rank's parameters, and all find theirs again in one checkpoint."""
    rank = torch.distributed.get_rank()

    def fresh() -> tuple[nn.Module, gradfast.SGD]:
        stage = nn.ModuleDict({f"stage{rank}": model((6, 5 + 2 * rank, 3), seed=rank)})
        group = torch.distributed.group.WORLD
        return stage, gradfast.SGD(stage.parameters(), lr=0.1, momentum=0.9, clip=CLIPS["AdaGC"], process_group=group)

    def steps(stage: nn.Module, optimizer: gradfast.SGD, which: slice) -> None:
        for batch in batches()[which]:
            optimizer.zero_grad()
            loss_of(stage[f"stage{rank}"], batch).backward()
            optimizer.step()

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    stage, optimizer = fresh()
    steps(stage, optimizer, slice(2))
    path = shared_folder() / "checkpoint"
    # A stage's own part of a checkpoint has its own keys; what all share is saved once.
    dcp.save({"optimizer": OptimizerState(stage, optimizer, flat)}, checkpoint_id=path)
    expected = optimizer.state_dict()["clip_state"]["values"]
    assert expected[1:].all()

    again, resumed = fresh()
    again.load_state_dict(stage.state_dict())
    dcp.load({"optimizer": OptimizerState(again, resumed, flat)}, checkpoint_id=path)
    assert torch.equal(resumed.state_dict()["clip_state"]["values"], expected)
    steps(stage, optimizer, slice(2, 4))
    steps(again, resumed, slice(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(stage.parameters(), again.parameters(), strict=True))
