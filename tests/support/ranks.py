"""Runs functions in forked processes, alone or as the ranks of torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

# Far more than any test takes. It ends deadlocks.
_SECONDS = 120


def _enter(rank: int, count: int, port: int, function: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(rank)


def run_ranks(count: int, function: Callable[[int], None]) -> None:
    """Calls `function(rank)` in `count` forked processes; an error in one of them ends all and is raised again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = start_processes(_enter, (count, port, function), count, join=False, start_method="fork")
    assert context is not None
    deadline = time.monotonic() + _SECONDS
    try:
        while not context.join(timeout=deadline - time.monotonic()):  # returns when a process ends
            if time.monotonic() > deadline:
                pytest.fail(f"the processes did not end within {_SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()


@contextmanager
def forked(function: Callable[[], object]) -> Iterator[multiprocessing.process.BaseProcess]:
    """Calls `function()` in a forked process, which is killed at the end of the block at the latest."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
