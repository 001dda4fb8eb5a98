"""Clocks, memory and limits of the device under test."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class _EventTime:
    """A moment on the device's own clock; the difference of two is the seconds between them."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, start: _EventTime) -> float:
        self._event.synchronize()
        return float(start._event.elapsed_time(self._event)) / 1e3


def cuda_timer() -> Any:
    """A timer for pytest-benchmark that reads CUDA events in place of the host's clock.

    It subtracts two readings and takes the difference for seconds, which is when the device is waited for.
    """
    return _EventTime()


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    read: Callable[[], Any] = cuda_timer if device.type == "cuda" else time.perf_counter
    seconds = []
    for _ in range(12):
        start = read()
        call()
        seconds.append(read() - start)
    return statistics.median(seconds[2:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of torch's copy between two tensors that fit into no cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second, two for each multiply-add, of torch's product of two large square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=random).to(device, dtype) for _ in range(2))
    target = torch.empty_like(left)
    return 2 * side**3 / _median_seconds(lambda: torch.mm(left, right, out=target), device)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _return_free_memory() -> None:
    """Gives what malloc has kept back to the system, so that using it again counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise OSError("this C library has no malloc_trim")
    trim(0)


def peak_memory(device: torch.device, call: Callable[[], Any]) -> tuple[int | None, float]:
    """Runs a call once and says by how much memory rose at its highest point, its result included.

    Args:
        device: Where it runs. On CUDA the caching allocator is asked; on the CPU Linux, which counts resident pages
            and so sees scratch memory of any library, to about half a megabyte.
        call: What to run.

    Returns:
        Bytes, None where nothing counts them, and the seconds that the call took on the host's clock.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - start
    before, counted = 0, True
    try:
        _return_free_memory()
        # 5 sets the high-water mark of resident memory back, see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, TypeError):
        counted = False
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return (max(_resident("VmHWM") - before, 0) if counted else None), seconds


def cold_copies(device: torch.device, input_bytes: int) -> int:
    """How many copies of the inputs to take turns with, so that a call does not find its own in the GPU's L2 cache.

    Small inputs may still lie there, as they do behind the kernel that makes them. On the CPU one set does: there
    the inputs are either larger than the last cache or so small that the call before left them in it anyway.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(2 + 2 * cache // max(input_bytes, 1), 64)
