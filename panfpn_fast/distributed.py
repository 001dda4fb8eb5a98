"""The processes that `torchrun` starts, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from panfpn_fast._device import check_device

T = TypeVar("T")


class Process(NamedTuple):
    """This process' place among those that work together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0


@contextmanager
def process_group(device: str | None = None) -> Iterator[Process]:
    """Joins the processes that torchrun started, or says that this one is alone.

    Args:
        device: Such as "cpu"; None: a GPU if there is one. With several processes each takes the GPU of its number.

    Raises:
        ValueError: The machine does not have this device.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, check_device(device))
        return
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # before anything touches the first GPU
    mine = check_device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    torch.distributed.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    try:
        yield Process(torch.distributed.get_rank(), torch.distributed.get_world_size(), mine)
    finally:
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """This process' rank and the number of processes: 0 and 1 outside of a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather_to_first(mine: T) -> list[T]:
    """Brings together what the processes have; every one of them must call this.

    Args:
        mine: This process'; it is pickled where there are several.

    Returns:
        In the first process everyone's, by rank; in the others nothing.
    """
    rank, count = place()
    if count == 1:
        return [mine]
    found: list[T | None] | None = [None] * count if rank == 0 else None
    torch.distributed.gather_object(mine, found)
    return [] if found is None else found  # type: ignore[return-value]  # the Nones have been replaced


def tell_all(message: T) -> T:
    """Returns the first process' message in every one; the others' are dropped, and all wait for the first."""
    if place()[1] == 1:
        return message
    box = [message]
    torch.distributed.broadcast_object_list(box)
    return box[0]
