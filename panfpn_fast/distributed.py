"""The processes that `torchrun` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Process(NamedTuple):
    """This process' place among those that train together."""

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
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, torch.device(kind))
        return
    mine = torch.device(kind)
    if mine.type == "cuda":
        mine = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(mine)
    torch.distributed.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    try:
        yield Process(torch.distributed.get_rank(), torch.distributed.get_world_size(), mine)
    finally:
        torch.distributed.destroy_process_group()
