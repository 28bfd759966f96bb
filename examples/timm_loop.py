"""timm: gradfast from its optimiser factory, in the loop of its train script. python examples/timm_loop.py"""

from __future__ import annotations

import timm
import timm.optim
import timm.scheduler
import torch
from timm.utils import NativeScaler

import gradfast.integrations.timm


def main(updates: int = 20) -> tuple[list[float], torch.optim.Optimizer]:
    """Train a small network on one batch, and return the losses and the optimiser."""
    torch.manual_seed(0)
    gradfast.integrations.timm.register()
    model = timm.create_model("test_resnet", num_classes=4)
    # timm keeps biases and norms from decaying; max_norm goes on to gradfast. In the train script:
    #   --opt gradfastadamw --opt-kwargs max_norm=1.0       and no --clip-grad
    optimizer = timm.optim.create_optimizer_v2(model, opt="gradfastadamw", lr=2e-3, weight_decay=0.05, max_norm=1.0)
    schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=updates, warmup_t=3, t_in_epochs=False)
    scaler = NativeScaler(device="cpu")
    images, targets = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    losses = []
    for update in range(updates):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=None, parameters=model.parameters())
        schedule.step_update(update)
        losses.append(loss.item())
    return losses, optimizer


if __name__ == "__main__":
    losses, optimizer = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, last gradient norm {optimizer.grad_norm.item():.3f}")
