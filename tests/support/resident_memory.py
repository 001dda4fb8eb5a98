"""Measures the peak memory of a call, whichever library allocates it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_rise(call: Callable[[], object]) -> int:
    """Runs a call and returns the rise of resident memory to its peak, in bytes (Linux counts pages).

    The call runs twice, and the second run is measured. The first run also loads code and data that the system had
    swapped out, and allocates what persists, such as gradients. Before the measurement, malloc returns the memory that
    it kept from earlier calls, so reusing it counts as well. Skips the test outside Linux, where the peak is not
    available.
    """
    if sys.platform != "linux":
        pytest.skip("only Linux reports the peak of resident memory")
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc_pid_clear_refs(5)
    before = _resident("VmRSS")
    result = call()
    rise = _resident("VmHWM") - before
    del result
    return rise
