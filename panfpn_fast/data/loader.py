"""Endless, reproducible batches for training."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from panfpn_fast._errors import UserError
from panfpn_fast.data.categories import Categories
from panfpn_fast.data.files import DataError
from panfpn_fast.data.sample import Sample, Target, make_target
from panfpn_fast.data.transfer import SenderGoneError, pack_in_worker
from panfpn_fast.data.transforms import Transform

_MOST_WORKERS = 256

# After this many damaged images in a row, the whole dataset is considered unusable.
_MOST_SKIPPED = 20


class PanopticDataset(Protocol):
    """A dataset for training and evaluation."""

    categories: Categories

    def __len__(self) -> int:
        """Returns the number of annotated images."""
        ...

    def load(self, index: int) -> Sample:
        """Reads one image and its annotation."""
        ...


class Batch(NamedTuple):
    """Images of one step, which can differ in size, and their targets."""

    images: list[Tensor]
    targets: list[Target]
    seeds: list[int]
    """Seeds of the random choices that training makes for each image, unique in a run."""


class Unreadable(NamedTuple):
    """Carries the message of an error out of a worker process, where raising it would print a traceback."""

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
    """Maps positions of the endless sequence of training images to images, by the seed alone."""

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
                    return Unreadable(
                        f"{_MOST_SKIPPED} images in a row could not be read; the last error: {error}"
                    )
                index = self.index_at(int(random.integers(self.length)))


def check_workers(workers: int) -> None:
    """Checks a number of worker processes.

    Raises:
        UserError: If it is negative, or so large that it must be a mistake.
    """
    if not 0 <= workers <= _MOST_WORKERS:
        raise UserError(f"workers: expected 0 to {_MOST_WORKERS}, got {workers}")


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Returns the iterator of a DataLoader, which starts its worker processes.

    The workers end with this process at the latest.

    Raises:
        UserError: If the processes cannot be started, for example because there is no /dev/shm for their locks.
    """
    children = set(multiprocessing.active_children())
    try:
        with torch.device("cpu"):  # a DataLoader draws a seed on the default device
            iterator: Any = iter(loader)
    except OSError as error:
        # Workers that did start. multiprocessing would wait for them at exit, and they ignore its SIGTERM.
        for child in set(multiprocessing.active_children()) - children:
            if child.daemon:
                child.kill()
        raise UserError(
            f"workers: cannot start {loader.num_workers} processes that load images ({error.strerror or error}); "
            "set workers to 0 to load without processes"
        ) from error
    workers = getattr(iterator, "_workers", [])
    if workers:
        _open_iterators.add(iterator)
        _workers.update(workers)
    return iterator  # type: ignore[no-any-return]


def prepare_worker(worker: int) -> None:
    """Prepares a worker process of a DataLoader, as its `worker_init_fn`.

    Workers ignore SIGINT and SIGTERM: Ctrl-C and schedulers signal the whole process group, but the main process
    decides when to stop, and `close_workers` stops the workers. A worker ends itself if the main process was killed, or
    if a result cannot be sent, for example because memory is full. Otherwise, such a worker would wait forever, or the
    main process would wait forever for the result.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_after_sending_failed)  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_after_sending_failed(error: Exception, result: object) -> None:
    print(f"panfpn-fast: a loader process cannot send an image: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def close_workers(iterator: Any) -> None:
    """Ends the worker processes of a DataLoader's iterator, also workers that hang; does nothing without workers."""
    workers = getattr(iterator, "_workers", ())
    try:
        if workers:
            iterator._shutdown_workers()
    except RuntimeError as error:
        # A worker that has been killed, for example by a signal before `prepare_worker` was called. It has ended.
        if not is_worker_failure(error):
            raise
    finally:
        for worker in workers:
            worker.kill()  # a worker that did not end in time
        _workers.difference_update(workers)


_open_iterators: weakref.WeakSet[Any] = weakref.WeakSet()
"""Iterators with worker processes that nobody has closed yet."""
_workers: set[Any] = set()
"""Their worker processes, and those of iterators that the garbage collector has deleted.

Such an iterator sends its workers a message, which need not arrive: the collector may run in the thread that sends.
"""


@atexit.register  # runs before the handler of multiprocessing, which waits for workers that ignore its SIGTERM
def _close_open_iterators() -> None:
    for iterator in list(_open_iterators):
        if all(worker._parent_pid == os.getpid() for worker in iterator._workers):
            with contextlib.suppress(Exception):  # the other iterators are closed, too
                close_workers(iterator)
    for worker in _workers:
        if worker._parent_pid == os.getpid():
            worker.kill()


def is_worker_failure(error: BaseException) -> bool:
    """Whether torch reports that a worker process was killed or ended by itself, or that it cannot be reached.

    The main process cannot receive from a worker if it has no free file descriptors.
    """
    lost = ("DataLoader worker (pid", "Too many open files", "received 0 items of ancdata")
    return isinstance(error, SenderGoneError) or (
        isinstance(error, RuntimeError) and str(error).startswith(lost)
    )


class TrainLoader:
    """Endless batches that depend on the seed alone, not on the number of worker processes.

    Each epoch has every image once, in a new order. Rank r of W takes every W-th image, so W processes with batches of
    B see the same images as one process with batches of W * B.

    Args:
        dataset: The training images.
        transform: Transform of each image.
        batch_size: Number of images per step in this process.
        seed: Seed of the order and the transforms.
        workers: Number of worker processes; 0 loads in this process.
        rank: Rank of this process in distributed training.
        world_size: Number of processes in distributed training.
        start: Number of steps before the first batch, for a resumed run.
        subset: Number of images to train on, chosen by the seed; None uses all.
        skip_bad: Whether an image that cannot be read is replaced by another one and counted in `skipped`, instead of
            raising an error.

    Raises:
        ValueError: If the dataset has no images or a number is out of range.
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
            raise ValueError("dataset: expected at least one image, got none")
        check_workers(workers)
        for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0)):
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
            collate_fn=pack_in_worker,
            worker_init_fn=prepare_worker,
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )

    def close(self) -> None:
        """Ends the worker processes.

        Call it after iterating. An error while loading ends them too, and so does the end of the process.
        """
        close_workers(self._loader._iterator)

    @property
    def epoch_length(self) -> int:
        """Number of images in an epoch."""
        return self._positions.length

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches endlessly. A loader can be iterated over only once.

        Raises:
            DataError: If an image cannot be read and `skip_bad` is False, or if 20 images in a row cannot be read.
            UserError: If the worker processes cannot be started.
        """
        batches = start_workers(self._loader)
        try:
            for found in batches:
                yield self._batch(found)
        finally:
            # torch closes an iterator that is garbage, but not one in a cycle: its queues may be finalized before it.
            close_workers(batches)

    def _batch(self, found: list[_Item | Unreadable]) -> Batch:
        items: list[_Item] = []
        for item in found:
            if isinstance(item, Unreadable):
                raise DataError(item.message)
            items.append(item)
            for message in item.skipped:
                if message not in self.skipped:
                    self.skipped.add(message)
                    warnings.warn(f"skipped {message}", stacklevel=2)
        return Batch(
            [item.image for item in items],
            [item.target for item in items],
            [item.seed for item in items],
        )
