"""How much memory a call takes at its highest point, whoever allocates it."""

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
    """Runs a call and returns by how many bytes resident memory rose meanwhile, counted in pages by the system.

    It runs twice, and the second time counts: the first one also brings back code and data that the system had put
    away since they were last used, and makes what stays, such as gradients. What malloc kept from earlier calls is
    given back first, so that using it again counts. Skips the test where the system does not count: outside of
    Linux.
    """
    if sys.platform != "linux":
        pytest.skip("only Linux counts the peak of resident memory")
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back, see proc_pid_clear_refs(5)
    before = _resident("VmRSS")
    result = call()
    rise = _resident("VmHWM") - before
    del result
    return rise
