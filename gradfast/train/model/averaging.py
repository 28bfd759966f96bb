"""A moving average of a model's weights and statistics, often better than the weights themselves."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from gradfast.clip.reduction import local_tensor


def kept_share(decay: float, updates: int) -> float:
    """What the average keeps at update number `updates`: min(decay, (1 + n) / (10 + n)), less at the start."""
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage:
    """a <- k a + (1 - k) w at each update, for parameters and buffers, beginning at the model as it is.

    k is `kept_share`, so that a short run is not dominated by its first weights (Polyak and Juditsky 1992; the warm-up
    is TensorFlow's). Integer buffers, such as counts of batches, are copied. Nothing waits for the device.

    Attributes:
        module: the average, a model like the one averaged.
        updates: how many there were.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        averages, current = tensors_of(self.module), tensors_of(model)
        real = [index for index, tensor in enumerate(averages) if tensor.is_floating_point()]
        keep = kept_share(self.decay, self.updates)
        torch._foreach_lerp_([averages[i] for i in real], [current[i] for i in real], 1 - keep)
        for index in set(range(len(averages))) - set(real):
            averages[index].copy_(current[index])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, as far as this process holds them."""
    return list(map(local_tensor, itertools.chain(model.parameters(), model.buffers())))
