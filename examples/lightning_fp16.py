"""Lightning with `gradient_clip_val` and fp16: clipped inside the step. python examples/lightning_fp16.py

Runs on a CPU in seconds; on a GPU leave `accelerator` and `plugins` out and give `precision="16-mixed"`.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import gradfast
from gradfast.integrations.lightning import ClipInStep


class Regression(pl.LightningModule):
    """A small network; the optimiser is the one line that gradfast changes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.network(inputs).float(), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return gradfast.AdamW(self.named_parameters(), lr=1e-2)


def main(steps: int = 60) -> dict[str, float]:
    """Train, and return what was logged last."""
    pl.seed_everything(0)
    inputs = torch.randn(320, 8)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=32, shuffle=True)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))],
        gradient_clip_val=1.0,
        callbacks=[ClipInStep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    model = Regression()
    trainer.fit(model, data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
