"""The monitor beside a step on a device: nothing in the loop waits."""

from __future__ import annotations

import pytest
import torch
from gpu.host import no_synchronisation
from torch import nn

import gradfast
from gradfast.monitor import Monitor

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", [gradfast.SGD, torch.optim.SGD])
def test_no_synchronisation_in_the_loop(kind: type[torch.optim.Optimizer], missing: bool) -> None:
    """Samples and the steps between, with and without a parameter that has no gradient."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda()
    options = {"max_norm": 1.0} if kind is gradfast.SGD else {}
    optimizer = kind(model.named_parameters(), lr=0.1, **options)
    monitor = Monitor(optimizer, model, every=3)
    inputs = torch.randn(16, 64, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        if missing:
            model[0].bias.grad = None
        monitor.log(loss=loss)
        optimizer.step()

    step()
    with no_synchronisation():
        for _ in range(8):
            step()
    monitor.close()
    assert monitor.last["step"] == 9 and monitor.norm("2") > 0
