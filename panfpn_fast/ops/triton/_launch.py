"""Helpers of the host functions: kernel launches, sizes and layouts.

A host function allocates tensors, calls torch ops and launches kernels. It decides by sizes, strides, dtypes and
settings only, never by values, so it can be traced by torch.compile and recorded as a plan (see `_plan`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch. The kernels count on fused multiply-adds, which Triton 3.10 no longer forms by
default. A launch that torch.compile traces has the options that Inductor chooses."""


class Recorder(Protocol):
    """Records the launches of a host function."""

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Launches a kernel and records the launch."""

    def call(self, function: Callable[[], Tensor]) -> Tensor:
        """Calls a function, and records that each call of the host function needs a call of it."""


class _Recording(threading.local):
    recorder: Recorder | None = None


recording = _Recording()
"""The recorder of the host function that this thread runs, if any."""


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel: records the launch, traces it, or just runs it.

    Args:
        kernel: A function decorated with `triton.jit`.
        grid: Number of programs along up to three axes.
        args: The kernel's arguments at run time, in order.
        options: Its compile-time arguments, and compiler options such as `num_warps`.
    """
    if recording.recorder is not None:
        recording.recorder.launch(kernel, grid, args, {**options, **OPTIONS})
    elif isinstance(kernel, triton.JITFunction):
        torch.library.wrap_triton(kernel)[grid](*args, **options)
    else:  # Triton's interpreter; torch.library.wrap_triton of torch 2.11 rejects its kernels
        kernel[grid](*args, **options)


def channels_last(x: Tensor) -> Tensor:
    """Returns the feature map in the kernels' layout, without a copy if it already has this layout."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Allocates a channels-last feature map with the dtype and device of another tensor."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def cdiv(value: int, divisor: int) -> int:
    """Divides and rounds up. `triton.cdiv` does the same but takes 2 us on the host."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """Returns the least power of two that is not below a size; a traced size becomes a constant of the graph."""
    return 1 << max(int(value) - 1, 0).bit_length()


def kernels_of(module: ModuleType) -> list[Any]:
    """Returns the compiled functions of a module: its kernels and the functions that they call."""
    return [value for value in vars(module).values() if isinstance(value, triton.JITFunction)]
