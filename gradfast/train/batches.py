"""Batches of images whose order and augmentation are functions of (seed, epoch, index) alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gradfast.train.augment import drawing_from, mix
from gradfast.train.images import BadImage, to_square, to_tensor
from gradfast.train.interrupt import SIGNALS
from gradfast.train.listing import Listing

Key = tuple[int, int]  # (epoch, index into the data set)


class Batch(NamedTuple):
    """Images [n, 3, size, size] uint8, classes [n] int64, files that should have been in it, and (epoch, number)."""

    images: Tensor
    targets: Tensor
    bad: list[BadImage]
    number: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        return len(self.targets)


class ImageDataset(Dataset):
    """Images of a listing by (epoch, index), from memory or from their files.

    Args:
        listing: the images.
        size: side of the squares that come out, in pixels.
        augmentation: applied to each image with torch's generator seeded by (seed, epoch, index); None for none.
        whole: whether the augmentation takes the whole image instead of its largest centred square.
        margin: what to_square leaves out.
        memory: [n, 3, size, size] uint8, the decoded squares of the listing; None reads files.
    """

    def __init__(
        self,
        listing: Listing,
        size: int,
        seed: int,
        augmentation: Callable[[Any], Any] | None = None,
        whole: bool = False,
        margin: float = 0.0,
        memory: Tensor | None = None,
    ) -> None:
        self.listing = listing
        self.size = size
        self.seed = seed
        self.augmentation = augmentation
        self.whole = whole
        self.margin = margin
        self.memory = memory

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | BadImage:
        epoch, index = key
        image = self.load(index)
        if isinstance(image, BadImage):
            return image
        if self.augmentation is not None:
            with drawing_from(self.seed, epoch, index):
                image = self.augmentation(image)
        return (image if isinstance(image, Tensor) else to_tensor(image)), self.listing.targets[index]

    def load(self, index: int) -> Any:
        if self.memory is not None:
            return self.memory[index]
        image = self.listing.read(index)
        if self.whole or isinstance(image, BadImage):
            return image
        return to_tensor(to_square(image, self.size, self.margin))


class EpochBatches(Sampler[list[Key]]):
    """Batches of (epoch, index); the order of an epoch is a function of (seed, epoch).

    Set `epoch`, and `start` to pass over the first batches of a half-done epoch, before iterating. A last batch that
    is not full is left out of training where there are others, since batch normalisation is noisy on a few images.

    Args:
        balance: the class of each image, for epochs in which all classes come equally often: as many images, drawn with
            replacement, each with a probability of 1 / (number of classes * images of its class).
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, training: bool, balance: Sequence[int] | None = None
    ) -> None:
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self.training = training
        self.chances: Tensor | None = None
        if balance is not None:
            classes = torch.tensor(balance)
            self.chances = 1.0 / torch.bincount(classes).double()[classes]
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full if self.training or rest == 0 else full + 1

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.size))
        if self.training:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            if self.chances is None:
                order = torch.randperm(self.size, generator=generator).tolist()
            else:
                order = torch.multinomial(self.chances, self.size, replacement=True, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chosen]


def collate(items: list[tuple[Tensor, int] | BadImage]) -> Batch:
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    return Batch(images, torch.tensor([target for _, target in good], dtype=torch.int64), bad)


def leave_stopping_to_main(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: a terminal sends them to the whole group of processes.

    The main process finishes its step, saves, and then ends the workers; a worker that died of the signal would end
    the run with an error instead.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_dead_worker(error: RuntimeError) -> bool:
    """Whether torch says that a worker was killed (as for want of memory), or ended by itself."""
    return str(error).startswith("DataLoader worker")


class BatchLoader:
    """The batches of one epoch after another, each with its number.

    Args:
        collate: makes a batch, a NamedTuple with a field `number`, of what the data set gives for its keys.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: EpochBatches,
        workers: int,
        pin_memory: bool,
        collate: Callable[[list[Any]], Any] = collate,
    ) -> None:
        self.batches = batches
        self._iterator: Iterator[Any] | None = None
        self.loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=leave_stopping_to_main,
            generator=torch.Generator(),  # else each epoch would draw from the generator that dropout uses
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches `start` and on of an epoch."""
        self.batches.epoch = epoch
        self.batches.start = start
        self._iterator = iter(self.loader)
        for number, batch in enumerate(self._iterator, start=start):
            yield batch._replace(number=(epoch, number))

    def close(self) -> None:
        """End the workers; there are no more epochs after this.

        Not left to the iterator's destructor: the traceback of an error keeps the iterator alive, and the process
        would wait for its workers for ever.
        """
        shut_down = getattr(self._iterator, "_shutdown_workers", None)  # absent where there are no workers
        if shut_down is not None:
            shut_down()
