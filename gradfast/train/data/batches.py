"""Batches of images whose order and augmentation are functions of (seed, epoch, index) alone."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gradfast.extras import first_line
from gradfast.train.data.augment import drawing_from, mix
from gradfast.train.data.images import BadImage, to_square, to_tensor
from gradfast.train.data.listing import Listing
from gradfast.train.interrupt import SIGNALS
from gradfast.train.machine.processes import World

RESTARTS = 3  # of workers, in an epoch
DEAD_WORKER = "DataLoader worker"  # how torch's errors about one begin

# (epoch, index into the data set); a guest's has further indices, to be taken in turn while an image cannot be read.
Key = tuple[int, ...]


class Batch(NamedTuple):
    """Images [n, 3, size, size] uint8, classes [n] int64, files that should have been in it, and (epoch, number).

    The first `guests` of the images, none or one, are there to be mixed with the next, and are learnt by another
    process.
    """

    images: Tensor
    targets: Tensor
    bad: list[BadImage]
    number: tuple[int, int] = (0, 0)
    guests: int = 0

    @property
    def size(self) -> int:
        return len(self.targets) - self.guests

    def emptied(self) -> Batch:
        """The same without its images."""
        return self._replace(images=self.images[:0], targets=self.targets[:0], guests=0)


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
        epoch, *indices = key
        for index in indices:
            image = self.load(index)
            if not isinstance(image, BadImage):
                break
        else:
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

    Of several processes each takes its part of every batch, after `split`: the order does not depend on how many there
    are.

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
        self.world = World()
        self.guests = 0

    def split(self, world: World, guests: int = 0) -> None:
        """Take this process's part of each batch from now on.

        Args:
            guests: 1 to put the image that precedes the part, going round in the whole batch, before it: the nearest
                that can be read, as it would be in the whole batch.
        """
        self.world = world
        self.guests = guests if world.size > 1 else 0

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
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            part = self.world.part(len(whole))
            keys: list[Key] = [(self.epoch, whole[place]) for place in part]
            if self.guests and keys:
                backwards = [*whole[part.start :], *whole[: part.start]][::-1]
                keys.insert(0, (self.epoch, *backwards))
            yield keys


def collate(items: list[tuple[Tensor, int] | BadImage], size: int = 1, guests: int = 0) -> Batch:
    """A batch of what can be used.

    Args:
        size: side of the images, in pixels, for a batch that has none.
        guests: how many of the first items are guests in it; of a bad one, its own process tells.
    """
    bad = [item for item in items[guests:] if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, 3, size, size, dtype=torch.uint8)
    targets = torch.tensor([target for _, target in good], dtype=torch.int64)
    return Batch(images, targets, bad, guests=sum(not isinstance(item, BadImage) for item in items[:guests]))


def leave_stopping_to_main(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: a terminal sends them to the whole group of processes.

    The main process finishes its step, saves, and then ends the workers; a worker that died of the signal would end
    the run with an error instead.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_dead_worker(error: RuntimeError) -> bool:
    """Whether torch says that a worker was killed (as for want of memory), or ended by itself."""
    return str(error).startswith(DEAD_WORKER)


@contextlib.contextmanager
def dead_workers_found_when_awaited() -> Iterator[None]:
    """Keep torch from raising the moment a worker dies, which may be in the middle of a step.

    It installs a handler of SIGCHLD with its first workers, and the error then comes up in whatever the main thread is
    doing. Without it, the error comes up where the batch is awaited, after five seconds at most.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


class BatchLoader:
    """The batches of one epoch after another, each with its number.

    A worker that dies (killed for want of memory, say) is replaced, and reading goes on at the batch that was awaited,
    `RESTARTS` times in an epoch.

    Args:
        collate: makes a batch, a NamedTuple with a field `number`, of what the data set gives for its keys.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: EpochBatches,
        workers: int,
        pin_memory: bool,
        collate: Callable[..., Any] = collate,
    ) -> None:
        self.dataset = dataset
        self.batches = batches
        self.workers = workers
        self.pin_memory = pin_memory
        self.collate = collate
        self.report: Callable[[str], None] = lambda text: None  # told of workers that were replaced
        self._iterator: Iterator[Any] | None = None
        self.loader = self._make_loader()

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
            persistent_workers=self.workers > 0,
            worker_init_fn=leave_stopping_to_main,
            generator=torch.Generator(),  # else each epoch would draw from the generator that dropout uses
        )

    def __len__(self) -> int:
        return len(self.batches)

    def split(self, world: World, guests: int = 0) -> None:
        """Read this process's part of each batch, before anything else: see `EpochBatches.split`."""
        self.batches.split(world, guests)
        if self.batches.guests:
            self.collate = functools.partial(self.collate, guests=guests)
            self.loader = self._make_loader()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches `start` and on of an epoch."""
        number, restarts = start, 0
        while True:
            try:
                for batch in self._read(epoch, number):
                    yield batch._replace(number=(epoch, number))
                    number += 1
            except RuntimeError as error:
                if not is_dead_worker(error) or restarts == RESTARTS:
                    raise
                restarts += 1
                self.report(
                    f"a process that reads images died ({first_line(error)}); reading goes on at batch {number + 1} "
                    f"with new ones ({restarts} of {RESTARTS})"
                )
                self.close()
                self.loader = self._make_loader()
            else:
                return

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        self.batches.epoch = epoch
        self.batches.start = start
        with dead_workers_found_when_awaited():
            self._iterator = iter(self.loader)
        while True:
            try:
                batch = next(self._iterator)
            except StopIteration:
                return
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if self.workers == 0 or str(error).startswith("Caught "):  # by torch, in a worker that lives
                    raise
                # Its batch has come, and what the batch's memory was to be asked for has not.
                raise RuntimeError(f"{DEAD_WORKER} is gone: {first_line(error)}") from error
            yield batch

    def close(self) -> None:
        """End the workers; there are no more epochs after this.

        Not left to the iterator's destructor: the traceback of an error keeps the iterator alive, and the process
        would wait for its workers for ever.
        """
        shut_down = getattr(self._iterator, "_shutdown_workers", None)  # absent where there are no workers
        if shut_down is not None:
            shut_down()
            for worker in self._iterator._workers:  # type: ignore[union-attr]
                if worker.is_alive():  # one that waits for what a dead one held; it ignores SIGTERM
                    worker.kill()
