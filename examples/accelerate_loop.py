"""HF Accelerate: `accelerator.clip_grad_norm_` inside the step. python examples/accelerate_loop.py"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import gradfast
from gradfast.integrations.accelerate import clip_in_step


def main(epochs: int = 6) -> tuple[float, float]:
    """Train, and return the last loss and the last gradient norm before clipping."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    inputs = torch.randn(320, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=32)
    model, optimizer, data = accelerator.prepare(model, gradfast.AdamW(model.named_parameters(), lr=1e-2), data)
    clip_in_step(accelerator, optimizer)
    for _ in range(epochs):
        for batch, targets in data:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(batch), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)  # reads nothing
                optimizer.step()  # measures, clips and updates in one pass, and fills `norm`
    return loss.item(), norm.item()


if __name__ == "__main__":
    print("loss {:.4f}, gradient norm {:.4f}".format(*main()))
