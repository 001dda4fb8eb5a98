"""Endless, repeatable batches for training."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.files import DataError
from panfpn_fast.data.sample import Sample, Target, make_target
from panfpn_fast.data.transforms import Transform

# So many damaged images in a row mean that the whole set is unusable.
_MOST_SKIPPED = 20


class PanopticDataset(Protocol):
    """What can be trained on."""

    categories: Categories

    def __len__(self) -> int:
        """Number of annotated images."""
        ...

    def load(self, index: int) -> Sample:
        """Reads one."""
        ...


class Batch(NamedTuple):
    """Images of one step; they may differ in size."""

    images: list[Tensor]
    targets: list[Target]
    seeds: list[int]
    """A number for each image, of its own among all the images of a run: for what training draws at random."""


class Unreadable(NamedTuple):
    """What a worker process says of an image that it cannot read; raised there, it would become a traceback."""

    message: str


class _Item(NamedTuple):
    image: Tensor
    target: Target
    seed: int
    skipped: list[str]


def _permutation(length: int, seed: int, epoch: int, subset: int | None) -> np.ndarray:
    chosen = np.arange(length)
    if subset is not None and subset < length:
        chosen = np.sort(np.random.default_rng((seed, 0)).permutation(length)[:subset])
    return chosen[np.random.default_rng((seed, 1, epoch)).permutation(len(chosen))]


class _Positions(Dataset["_Item | Unreadable"]):
    """The endless sequence of training images: position -> image, by the seed alone."""

    def __init__(
        self, dataset: PanopticDataset, transform: Transform, seed: int, subset: int | None, skip_bad: bool
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.subset = subset
        self.skip_bad = skip_bad
        self.length = len(dataset) if subset is None else min(subset, len(dataset))
        self._epoch = (-1, np.arange(0))

    def index_at(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, _permutation(len(self.dataset), self.seed, epoch, self.subset))
        return int(self._epoch[1][place])

    def __getitem__(self, position: int) -> _Item | Unreadable:
        random = np.random.default_rng((self.seed, 2, position))
        skipped: list[str] = []
        index = self.index_at(position)
        while True:
            try:
                sample = self.transform(self.dataset.load(index), random)
                return _Item(sample.image, make_target(sample), self.seed * 2**40 + position, skipped)
            except (DataError, OSError) as error:
                if not self.skip_bad:
                    return Unreadable(str(error))
                skipped.append(str(error))
                if len(skipped) == _MOST_SKIPPED:
                    return Unreadable(f"{_MOST_SKIPPED} images in a row could not be read; the last: {error}")
                index = self.index_at(int(random.integers(self.length)))


def _as_list(items: list[_Item | Unreadable]) -> list[_Item | Unreadable]:
    return items


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and schedulers signal a whole group of processes. The one that trains decides when to end; the loaders end
    # with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TrainLoader:
    """Endless batches that depend on the seed alone, not on the number of worker processes.

    Every image is taken once in each epoch, in an order of its own for each. Rank r of W takes every W-th image, so W
    processes with batches of B see together what one process with batches of W * B sees.

    Args:
        dataset: What to train on.
        transform: Applied to each image.
        batch_size: Images in each step of this process.
        seed: Of the order and of the transforms.
        workers: Processes that load; 0 loads in this one.
        rank: This process' number in distributed training.
        world_size: Number of processes.
        start: Steps that were taken before: where a resumed run goes on.
        subset: Train on so many images only, chosen by the seed.
        skip_bad: An image that cannot be read is replaced by another one and counted in `skipped`, not an error.

    Raises:
        ValueError: There is nothing to train on, or a number is out of range.
    """

    def __init__(
        self,
        dataset: PanopticDataset,
        transform: Transform,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        subset: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset: there are no images in it")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("start", start, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if subset is not None and subset < 1:
            raise ValueError(f"subset: expected at least 1, got {subset}")
        self.skipped: set[str] = set()
        self._positions = _Positions(dataset, transform, seed, subset, skip_bad)
        step = batch_size * world_size
        batches = (
            range(first + rank, first + step, world_size) for first in itertools.count(start * step, step)
        )
        self._loader: DataLoader[_Item | Unreadable] = DataLoader(
            self._positions,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists of positions
            num_workers=workers,
            collate_fn=_as_list,
            worker_init_fn=_prepare_worker,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )

    @property
    def epoch_length(self) -> int:
        """Images in an epoch."""
        return self._positions.length

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end; can be iterated over once.

        Raises:
            DataError: An image cannot be read and is not to be skipped, or twenty in a row cannot.
        """
        for found in self._loader:
            items: list[_Item] = []
            for item in found:
                if isinstance(item, Unreadable):
                    raise DataError(item.message)
                items.append(item)
                for message in item.skipped:
                    if message not in self.skipped:
                        self.skipped.add(message)
                        warnings.warn(f"skipped {message}", stacklevel=2)
            yield Batch(
                [item.image for item in items],
                [item.target for item in items],
                [item.seed for item in items],
            )
