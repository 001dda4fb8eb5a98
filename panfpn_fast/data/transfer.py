"""Passes tensors between processes as one block of memory, with one file descriptor and without /dev/shm.

torch passes each tensor in shared memory of its own, with a file descriptor that stays open: a few batches of images
exceed the 64 MB of /dev/shm in a container, or the usual limit of 1,024 descriptors.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGNMENT = 64


class SenderGoneError(RuntimeError):
    """The process that packed an object ended before another process received it."""


class Packed:
    """An object whose tensors are in one block of memory; unpickling it in another process returns the object.

    The block is an anonymous file (memfd_create) that both processes map: the other process copies nothing. Where the
    system has no such files, or no descriptor is free, the block is part of the pickled bytes.

    Args:
        value: Any object that can be pickled; its tensors must be on the CPU.

    Note:
        It can be unpickled once, while the process that made it is alive.
    """

    def __init__(self, value: object) -> None:
        self._buffers: list[pickle.PickleBuffer] = []
        bytes_ = io.BytesIO()
        _Pickler(bytes_, protocol=5, buffer_callback=self._buffers.append).dump(value)
        self._pickled = bytes_.getvalue()
        views = [buffer.raw() for buffer in self._buffers]
        self._spans: list[tuple[int, int]] = []
        end = 0
        for view in views:
            self._spans.append((end, end + view.nbytes))
            end += -(-view.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._file = None
        block: Any = None
        with contextlib.suppress(AttributeError, OSError):  # no memfd_create, no descriptor, no socket
            self._file, block = _shared(end)
        self._bytes: bytearray | None = None
        if block is None:
            block = self._bytes = bytearray(end)
        target = memoryview(block)
        for (start, stop), view in zip(self._spans, views, strict=True):
            target[start:stop] = view

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns the call that restores the object."""
        return _unpack, (self._pickled, self._spans, self._file, self._bytes)


def pack_in_worker(value: Any) -> Any:
    """Returns the value, packed if a worker of a DataLoader calls this; a `collate_fn`."""
    return value if get_worker_info() is None else Packed(value)


class _Pickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays, whose data need not be part of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented


def _shared(size: int) -> tuple[Any, mmap.mmap]:
    """Returns a handle to a new block of shared memory that another process can open, and the block."""
    descriptor = os.memfd_create("panfpn_fast")
    try:
        os.posix_fallocate(
            descriptor, 0, max(size, 1)
        )  # raises an error where memory would end the process later
        return DupFd(descriptor), mmap.mmap(descriptor, max(size, 1))
    finally:
        os.close(descriptor)


def _unpack(pickled: bytes, spans: Sequence[tuple[int, int]], file: Any, bytes_: bytearray | None) -> object:
    block: Any = bytes_
    if file is not None:
        try:
            descriptor = file.detach()
        except (ConnectionError, FileNotFoundError, EOFError) as error:
            raise SenderGoneError(f"the process that sends images has ended: {error}") from error
        try:
            block = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
    view = memoryview(block)
    return pickle.loads(pickled, buffers=[view[start:stop] for start, stop in spans])
