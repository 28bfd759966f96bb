"""Lightning: gradient_clip_val once, inside the step, in every precision; and what it says without the callback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gradfast
from gradfast.errors import UserError

pl = pytest.importorskip("lightning.pytorch")
from gradfast.integrations.lightning import ClipInStep  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Line(pl.LightningModule):
    """Two weights with known gradients: 6 and 8, of norm 10, whatever the weights."""

    def __init__(self, *optimizers: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.makers = optimizers
        self.automatic_optimization = len(optimizers) == 1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.weight * torch.tensor([6.0, 8.0])).sum()

    def configure_optimizers(self) -> object:
        made = [make([self.weight]) for make in self.makers]
        return made if len(made) > 1 else made[0]


def sgd(**options: object) -> object:
    return lambda parameters: gradfast.SGD(parameters, lr=1.0, **options)


def fit(module: pl.LightningModule, steps: int = 1, fp16: bool = False, callback: bool = True, **options: object):
    if fp16:
        from lightning.pytorch.plugins.precision import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options["plugins"] = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[ClipInStep()] if callback else [],
        **quiet,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=1))
    return trainer


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    ("value", "own", "limit"), [(5.0, None, 5.0), (5.0, 2.0, 2.0), (2.0, 5.0, 2.0), (None, 5.0, 5.0)]
)
def test_clips_once_to_the_smaller_limit(value: float | None, own: float | None, limit: float, fp16: bool) -> None:
    module = Line(sgd(max_norm=own))
    trainer = fit(module, gradient_clip_val=value, fp16=fp16)
    expected = [-6 * limit / (10 + 1e-6), -8 * limit / (10 + 1e-6)]
    assert module.weight.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(trainer.callback_metrics["grad_norm"]) == pytest.approx(10.0)
    scale = 1024.0 if fp16 else 1.0
    assert module.weight.grad is None or module.weight.grad.tolist() == [6.0 * scale, 8.0 * scale]  # nobody wrote them
    assert trainer.gradient_clip_val == value
    assert trainer.optimizers[0].max_norm == own


def test_accumulation_clips_the_sum() -> None:
    module = Line(sgd())
    fit(module, gradient_clip_val=5.0, accumulate_grad_batches=4)
    assert module.weight.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)


def test_without_the_callback_fp16_clipping_is_refused_by_lightning_and_max_norm_works() -> None:
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Line(sgd()), fp16=True, callback=False, gradient_clip_val=5.0)
    module = Line(sgd(max_norm=5.0))
    fit(module, fp16=True, callback=False)
    assert module.weight.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)


def test_limits_are_given_back_after_an_error() -> None:
    class Failing(Line):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if index == 1:
                raise ValueError("in the middle")
            return super().training_step(batch, index)

    held: list[object] = []
    module = Failing(sgd(max_norm=7.0))
    module.on_train_start = lambda: held.append(module.trainer)
    with pytest.raises(ValueError, match="in the middle"):
        fit(module, steps=3, gradient_clip_val=5.0)
    (trainer,) = held
    assert trainer.gradient_clip_val == 5.0
    assert trainer.optimizers[0].max_norm == 7.0


def test_by_value_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match='use "norm"'):
        fit(Line(sgd()), gradient_clip_val=5.0, gradient_clip_algorithm="value")


def test_other_optimisers_are_left_to_lightning() -> None:
    module = Line(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    trainer = fit(module, gradient_clip_val=5.0)
    assert module.weight.tolist() == pytest.approx([-3.0, -4.0], rel=1e-6)
    assert "grad_norm" not in trainer.callback_metrics


def test_schedulers_and_checkpoints(tmp_path: object) -> None:
    """Lightning saves and restores the optimiser, and the scheduler drives it."""

    class Scheduled(Line):
        def configure_optimizers(self) -> object:
            optimizer = gradfast.SGD([self.weight], lr=1.0, momentum=0.5)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    straight = Scheduled()
    straight.automatic_optimization = True
    fit(straight, steps=4, gradient_clip_val=5.0)
    first = Scheduled()
    first.automatic_optimization = True
    trainer = fit(first, steps=2, gradient_clip_val=5.0)
    trainer.save_checkpoint(tmp_path / "mid.ckpt")
    second = Scheduled()
    second.automatic_optimization = True
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    resumed = pl.Trainer(max_steps=4, accelerator="cpu", gradient_clip_val=5.0, callbacks=[ClipInStep()], **quiet)
    data = DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=1)
    resumed.fit(second, data, ckpt_path=tmp_path / "mid.ckpt", weights_only=False)
    torch.testing.assert_close(second.weight, straight.weight)


def test_example(example: object) -> None:
    logged = example("lightning_fp16").main()
    assert logged["loss"] < 0.5
    assert logged["grad_norm"] > 0
