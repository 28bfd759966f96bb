"""HF Trainer: `max_grad_norm` inside the step, `grad_norm` in its log. python examples/hf_trainer.py"""

from __future__ import annotations

import tempfile

import torch
import transformers
from torch.utils.data import TensorDataset

import gradfast
from gradfast.integrations.transformers import ClipInStep


class Regression(torch.nn.Module):
    """Takes `x` and `labels`, returns a loss, as the Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.network(x)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


def main(steps: int = 60) -> list[dict[str, float]]:
    """Train, and return the Trainer's log."""
    transformers.set_seed(0)
    inputs = torch.randn(320, 8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=Regression(),
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                learning_rate=1e-2,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=TensorDataset(inputs, inputs.sum(1, keepdim=True)),
            data_collator=collate,
            optimizer_cls_and_kwargs=(gradfast.AdamW, {"lr": 1e-2}),
        )
        trainer.add_callback(ClipInStep(trainer))
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    for line in main():
        print(line)
