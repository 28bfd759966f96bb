"""What torch's generators will draw next, of each process: taken down for a checkpoint, and taken up again."""

from __future__ import annotations

from typing import Any

import torch

from gradfast.train.data.augment import mix
from gradfast.train.machine.processes import World


def start_drawing(world: World, *numbers: int) -> None:
    """Let each process draw differently, as for dropout; the main one goes on with what it has."""
    if not world.is_main:
        torch.manual_seed(mix(*numbers, world.rank))


def random_states(world: World, device: torch.device) -> dict[str, Any]:
    """`random_state` of the main process, and with it those of the others."""
    own, *others = world.gather(random_state(device))
    return own | ({"others": others} if others else {})


def set_random_states(state: dict[str, Any], world: World, device: torch.device, *numbers: int) -> None:
    """Take up what `random_states` gave; on another number of processes, `start_drawing` from it and some numbers."""
    states = [state, *state.get("others", [])]
    if world.is_main or len(states) == world.size:
        set_random_state(states[world.rank], device)
    else:
        start_drawing(world, *numbers)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators for the CPU and for `device`, as tensors."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Take up what `random_state` gave; a device of another type keeps its own."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0], device)
