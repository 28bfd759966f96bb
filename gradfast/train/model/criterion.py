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
        logits, weights = self.exact(logits)
        return functional.cross_entropy(logits, targets, weight=weights, label_smoothing=self.smoothing)

    def sums(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator without smoothing, so that batches add up to the loss of a whole set."""
        logits, weights = self.exact(logits)
        total = functional.cross_entropy(logits, targets, weight=weights, reduction="sum")
        count = targets.new_tensor(len(targets)) if weights is None else weights[targets].sum()
        return total, count

    def exact(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and weights in fp32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, None if self.weights is None else self.weights.to(logits.dtype)
