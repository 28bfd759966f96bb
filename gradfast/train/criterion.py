"""The loss: cross entropy with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """w_k = n / (K n_k) for K classes of n_k images, n in all: every class weighs the same; the mean image weighs 1.

    Returns: [K] float32.
    """
    total = sum(counts)
    return torch.tensor([total / (len(counts) * count) for count in counts], dtype=torch.float32)


class ClassificationLoss(nn.Module):
    """sum_i w_{y_i} l_i / sum_i w_{y_i}, with l_i the cross entropy of image i; labels are smoothed in training only.

    Args:
        weights: [K] float32, one per class, or None for equal weights.
        smoothing: share of each label that is spread evenly over all classes (Szegedy et al. 2016).
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [n, K], targets [n] int64 -> 0-d loss.

        Targets may also be shares [n, K] of each class, as of mixed images; the sum is then divided by n.
        """
        return functional.cross_entropy(logits.float(), targets, weight=self.weights, label_smoothing=self.smoothing)

    def sums(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator without smoothing, so that batches add up to the loss of a whole set."""
        total = functional.cross_entropy(logits.float(), targets, weight=self.weights, reduction="sum")
        count = targets.new_tensor(len(targets)) if self.weights is None else self.weights[targets].sum()
        return total, count
