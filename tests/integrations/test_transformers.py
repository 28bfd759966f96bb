"""HF Trainer: max_grad_norm inside the step, once; the norm before clipping in the log; the same weights as torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import gradfast

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from gradfast.integrations.transformers import ClipInStep  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Line(torch.nn.Module):
    """A gradient of (6, 8), of norm 10, whatever the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * x.mean(0)).sum()}


class Bowl(Line):
    """A gradient that changes with the weights."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.weight - x.mean(0)) ** 2).sum()}


def trained(
    folder: Path,
    optimizer: object,
    callback: bool = True,
    steps: int = 1,
    model: type[Line] = Line,
    resume: bool = False,
    **options: object,
) -> tuple:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"learning_rate": 1.0, "save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(
        model=model(),
        args=arguments,
        train_dataset=TensorDataset(torch.tensor([[6.0, 8.0]] * 64)),
        data_collator=lambda rows: {"x": torch.stack([x for (x,) in rows])},
        optimizer_cls_and_kwargs=optimizer,
    )
    if callback:
        trainer.add_callback(ClipInStep(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return (
        trainer,
        trainer.model.weight.tolist(),
        [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h],
    )


@pytest.mark.parametrize(
    ("value", "own", "limit"), [(5.0, None, 5.0), (5.0, 2.0, 2.0), (2.0, 5.0, 2.0), (0.0, 5.0, 5.0)]
)
def test_clips_once_to_the_smaller_limit(tmp_path: Path, value: float, own: float | None, limit: float) -> None:
    optimizer = (gradfast.SGD, {"lr": 1.0, "max_norm": own})
    trainer, weight, norms = trained(tmp_path, optimizer, max_grad_norm=value)
    assert weight == pytest.approx([-6 * limit / 10, -8 * limit / 10], rel=1e-6)
    assert norms == [10.0]
    assert "clip_grad_norm_" not in vars(trainer.accelerator)  # put back


def test_same_as_torch_over_steps_and_accumulation(tmp_path: Path) -> None:
    options = {"lr": 0.1, "betas": (0.8, 0.9)}
    runs = [
        trained(tmp_path, (kind, options), steps=6, max_grad_norm=1.0, gradient_accumulation_steps=2)
        for kind in (gradfast.AdamW, torch.optim.AdamW)
    ]
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    assert runs[0][2] == pytest.approx(runs[1][2], rel=1e-6)


def test_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    """The Trainer saves and loads the optimiser's state; the run goes on as if it had not been cut."""

    def run(folder: Path, steps: int, resume: bool = False) -> list[float]:
        optimizer = (gradfast.AdamW, {"lr": 0.1})
        saving = {"learning_rate": 0.1, "save_strategy": "steps", "save_steps": 3}
        return trained(folder, optimizer, steps=steps, model=Bowl, resume=resume, **saving)[1]

    straight = run(tmp_path / "straight", 6)
    run(tmp_path / "cut", 3)
    assert run(tmp_path / "cut", 6, resume=True) == straight


def test_example(example: object) -> None:
    log = example("hf_trainer").main()
    assert log[-2]["loss"] < log[0]["loss"] / 4
    assert log[0]["grad_norm"] > 1.0
