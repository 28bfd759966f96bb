"""Batches whose images are mixtures of two, with labels in proportion; a function of (seed, epoch, batch)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

from gradfast.train.data.augment import drawing_from

# Images [n, 3, h, w] and classes [n], with the number of the batch -> images [n, 3, h, w] and shares [n, K].
Mixing = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]

_OF_A_BATCH = -1  # sets the draws of batch (epoch, number) apart from those of image (epoch, index)


def build_mixing(classes: int, mixup: float, cutmix: float, seed: int) -> Mixing | None:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) by torchvision; None where both are off.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) that the share of the first image is drawn from; 0 for never.
            Where both are given, each batch is one or the other with equal chances.
    """
    ways = []
    if mixup > 0:
        ways.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix > 0:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    if not ways:
        return None
    either = v2.RandomChoice(ways)

    def mix_batch(images: Tensor, targets: Tensor, number: tuple[int, int]) -> tuple[Tensor, Tensor]:
        with drawing_from(seed, *number, _OF_A_BATCH):
            mixed, shares = either(images, targets)
        return mixed, shares

    return mix_batch
