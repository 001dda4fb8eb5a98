"""Clocks, memory counters and peak rates of the device under test."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class _EventTime:
    """A time on the device's clock; the difference of two is in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, start: _EventTime) -> float:
        self._event.synchronize()
        return float(start._event.elapsed_time(self._event)) / 1e3


def cuda_timer() -> Any:
    """Reads the GPU's clock with an event; the difference of two readings waits for the GPU and is in seconds."""
    return _EventTime()


def device_name(device: torch.device) -> str:
    """Returns the model name of the device; of a CPU also its vector instructions, which some names do not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} with {torch.backends.cpu.get_cpu_capability().replace('AVX512', 'AVX-512')}"


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    read: Callable[[], Any] = cuda_timer if device.type == "cuda" else time.perf_counter
    seconds = []
    for _ in range(12):
        start = read()
        call()
        seconds.append(read() - start)
    return statistics.median(seconds[2:])


def copy_bandwidth(device: torch.device) -> float:
    """Measures torch's copy between two tensors that exceed every cache, in bytes read plus written per second."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures torch's product of two large square matrices, in operations per second (two per multiply-add)."""
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
    """Returns the memory that malloc holds to the system, so that using it again is counted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise OSError("this C library has no malloc_trim")
    trim(0)


def peak_memory(device: torch.device, call: Callable[[], Any]) -> tuple[int | None, float]:
    """Runs a call once and measures its peak memory above the memory in use before, its result included.

    Args:
        device: The device that the call runs on. On CUDA the caching allocator counts. On the CPU Linux counts resident
            pages, which includes the scratch memory of every library, to about half a megabyte.
        call: The function to run.

    Returns:
        Bytes, or None where the platform does not count them, and the duration of the call in seconds of the host's
        clock.
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
        # 5 resets the high-water mark of resident memory, see proc_pid_clear_refs(5).
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
    """Returns how many copies of the inputs to rotate, so that a call does not find its inputs in the GPU's L2 cache.

    Small inputs may still be cached, as they are in use, right after the kernel that writes them. The CPU needs only
    one set: its inputs are either larger than the last-level cache, or so small that the previous call left them in
    it anyway.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(2 + 2 * cache // max(input_bytes, 1), 64)


def bfloat16_problem(device: torch.device) -> str | None:
    """Returns why a device computes bfloat16 slowly, or None if it has the instructions."""
    if device.type == "cuda":
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return None
    return "this CPU has no bfloat16 arithmetic (AVX512_BF16 or AMX)"


def memory_problem(gigabytes: int, device: torch.device) -> str | None:
    """Returns why a case that takes so many GB of memory cannot run on a device, or None if it can."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        None if total >= gigabytes * 10**9 else f"takes {gigabytes} GB of memory; here are {total / 1e9:.0f}"
    )
