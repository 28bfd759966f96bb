"""What a run learns from and what it is measured on, of whatever kind the images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradfast.train.config import TrainConfig
from gradfast.train.data.batches import BatchLoader, EpochBatches
from gradfast.train.data.images import BadImage


@dataclass
class Parts:
    """The two parts of a run's data.

    Attributes:
        train, evaluation: data sets, each with the `listing` that it reads.
        bad: what was left out: files, and boxes of a detector.
        workers: processes that will read images.
    """

    train: Any
    evaluation: Any
    bad: list[BadImage]
    workers: int

    @property
    def classes(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.train.listing.classes
        return names

    def fingerprint(self) -> str:
        """Changes where the images or their split do."""
        text: str = self.train.listing.fingerprint() + self.evaluation.listing.fingerprint()
        return text

    def make_loaders(
        self, config: TrainConfig, pin_memory: bool, collate: Callable[..., Any], balance: Sequence[int] | None = None
    ) -> tuple[BatchLoader, BatchLoader]:
        """(training, evaluation) loaders.

        Args:
            collate: makes a batch of what the data sets give.
            balance: of training, as `EpochBatches` takes it.
        """
        train = EpochBatches(len(self.train), config.batch_size, config.seed, training=True, balance=balance)
        evaluation = EpochBatches(len(self.evaluation), config.batch_size, config.seed, training=False)
        return (
            BatchLoader(self.train, train, self.workers, pin_memory, collate),
            BatchLoader(self.evaluation, evaluation, self.workers, pin_memory, collate),
        )
