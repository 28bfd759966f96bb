"""Accuracy and balanced accuracy from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


class Confusion:
    """Counts [K, K] int64 of (true class, predicted class), kept on the device until read."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits [n, K], targets [n] int64."""
        cells = targets * self.classes + logits.argmax(dim=1)
        self.counts += torch.bincount(cells, minlength=self.classes**2).view_as(self.counts)

    def accuracy(self) -> float:
        """Share of images whose class is right; nan where there were none."""
        counts = self.counts.double()
        return float(counts.trace() / counts.sum())

    def balanced_accuracy(self) -> float:
        """Mean over the classes seen of the share of their images that are right: 1/K for any constant guess."""
        counts = self.counts.double()
        images = counts.sum(dim=1)
        seen = images > 0
        return float((counts.diagonal()[seen] / images[seen]).mean())


def majority_share(counts: list[int]) -> float:
    """The accuracy of always answering with the most frequent class."""
    return max(counts) / sum(counts)
