"""The processes that `torchrun` starts, and the collectives among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from panfpn_fast._device import device_name, resolve_device
from panfpn_fast._errors import UserError, one_line

T = TypeVar("T")


class Process(NamedTuple):
    """This process's rank, the number of processes, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0


PATIENCE = timedelta(hours=12)
"""How long a process waits for the others by default: those on slower machines need longer for their images."""


@contextmanager
def process_group(device: str | None = None, patience: timedelta | None = PATIENCE) -> Iterator[Process]:
    """Joins the process group that torchrun started; outside of torchrun, yields a group of one.

    A `WORLD_SIZE` of 1 without the other variables of torchrun, which some clusters set, counts as outside.

    Args:
        device: For example "cpu"; None chooses a GPU if there is one. With several processes each takes the GPU of its
            local rank.
        patience: How long a process waits for the others in a collective operation before it fails; None for torch's
            own limit, which is 10 minutes on GPUs and 30 minutes on CPUs. The end of another process is noticed
            earlier as a rule, because its connections close.

    Raises:
        UserError: If this machine does not have the device, the variables of torchrun are incomplete or invalid, or the
            other processes cannot be reached.
    """
    if launched_rank() is None:
        yield Process(0, 1, _device(device))
        return
    if (device_name(device) or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # before anything touches the first GPU
    mine = _device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    try:
        torch.distributed.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=patience)
    except (RuntimeError, OSError, ValueError) as error:  # torch's messages can fill a page
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: cannot join the other processes at {address} "
            f"({one_line(error):.60}); start all of them with torchrun"
        ) from error
    try:
        yield Process(torch.distributed.get_rank(), torch.distributed.get_world_size(), mine)
    finally:
        torch.distributed.destroy_process_group()


def launched_rank() -> int | None:
    """Returns the rank that torchrun gave to this process; None if torchrun did not start it.

    Raises:
        UserError: If `WORLD_SIZE` announces several processes but a variable of torchrun is missing, or if one of them
            is invalid.
    """
    world_size = _variable("WORLD_SIZE", 1)
    if world_size is None:
        return None
    found = {
        "RANK": _variable("RANK", 0, world_size - 1),
        "LOCAL_RANK": _variable("LOCAL_RANK", 0),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or None,
        "MASTER_PORT": _variable("MASTER_PORT", 0, 65535),
    }
    missing = [name for name, value in found.items() if value is None]
    if not missing:
        return int(found["RANK"] or 0)
    if world_size == 1:
        return None
    raise UserError(
        f"WORLD_SIZE: expected the environment of torchrun, got {world_size} without {', '.join(missing)}. "
        "Start the processes with torchrun, or unset WORLD_SIZE for a single process"
    )


def _variable(name: str, least: int, most: int | None = None) -> int | None:
    """Returns the number in an environment variable; None if it is not set or empty."""
    text = os.environ.get(name)
    if not text:
        return None
    wanted = f"at least {least}" if most is None else f"from {least} to {most}"
    if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    raise UserError(
        f"{name}: expected a whole number {wanted} in this environment variable of torchrun, got {text!r}"
    )


def _device(name: str | None) -> torch.device:
    try:
        return resolve_device(name)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def rank_and_world_size() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: 0 and 1 outside of a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Gathers a value from every rank on rank 0; every process must call this.

    Args:
        value: This rank's value; it is pickled if there are several processes.

    Returns:
        On rank 0, the values of all ranks in rank order; an empty list on the other ranks.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    found: list[T | None] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(value, found)
    return [] if found is None else found  # type: ignore[return-value]  # the Nones have been replaced


def broadcast(value: T) -> T:
    """Returns rank 0's value on every rank; every process must call this, and all wait for rank 0."""
    if rank_and_world_size()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def mean_count(count: Tensor) -> Tensor:
    """Returns the mean of a count over all ranks; the sum over the ranks counts as at least 1, so none divides by 0."""
    world_size = rank_and_world_size()[1]
    if world_size > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return count.clamp(min=1).float() / world_size
