"""Counters with which the last program of a launch finds out that it is the last, and can use what the others stored.

This saves a second launch for the combination of partial sums. Which program is the last varies, but not what it does:
it adds in a fixed order.

Each counter must be zero before the launch, and no two launches that may run at the same time can share it. The last
program sets it to zero again. So one launch after the other on a stream can use the same counters. A captured launch
may be replayed on any stream, so it has counters of its own.
"""

from __future__ import annotations

import threading
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from panfpn_fast.ops.triton._launch import next_power_of_2, recording

_FOR_CAPTURES = 1 << 16
"""Counters per device for launches in CUDA graphs. A graph of the network takes about ten per image."""

_LEAST = 64

_lock = threading.Lock()
_of_streams: dict[tuple[int, int], Tensor] = {}
_of_captures: dict[int, tuple[Tensor, int]] = {}
"""For each device, the counters for captured launches, and how many of them have been given out."""


@triton.jit
def is_last(counter, programs):
    """Whether all other programs that share a counter have called this; then what they stored before can be loaded."""
    tl.debug_barrier()  # one thread counts, after the stores of all threads
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


def counters(like: Tensor, count: int) -> Tensor:
    """Returns counters for one launch, int32 [count], on the device of a tensor."""
    if recording.recorder is not None:
        return recording.recorder.call(partial(_current, like.device, count))
    return torch.zeros(
        count, dtype=torch.int32, device=like.device
    )  # traced, or a host function called alone


def _current(device: torch.device, count: int) -> Tensor:
    """Returns counters for a launch on the current stream of the current device, which is `device`."""
    index, stream = -1, 0
    if device.type == "cuda":
        index = torch.cuda.current_device()
        if torch.cuda.is_current_stream_capturing():
            return _for_capture(index, device, count)
        stream = torch._C._cuda_getCurrentRawStream(index)
    found = _of_streams.get((index, stream))
    if found is None or len(found) < count:
        size = max(next_power_of_2(count), _LEAST)
        found = _of_streams[index, stream] = torch.zeros(size, dtype=torch.int32, device=device)
        with _lock:
            if index not in _of_captures:
                pool = torch.zeros(_FOR_CAPTURES, dtype=torch.int32, device=device)
                _of_captures[index] = pool, 0
    return found[:count]


def _for_capture(index: int, device: torch.device, count: int) -> Tensor:
    with _lock:
        pool, used = _of_captures.get(index, (None, 0))
        if pool is not None and used + count <= len(pool):
            _of_captures[index] = pool, used + count
            return pool[used : used + count]
    return torch.zeros(count, dtype=torch.int32, device=device)  # the graph sets them to zero in each replay
