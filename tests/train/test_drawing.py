"""Random states are taken down and taken up again."""

from __future__ import annotations

import torch

from gradfast.train.machine.drawing import random_state, set_random_state


def test_random_states_come_back() -> None:
    state = random_state(torch.device("cpu"))
    expected = torch.rand(3)
    torch.rand(5)
    set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
