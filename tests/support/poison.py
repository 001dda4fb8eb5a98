"""Poisons fresh memory, so that tests detect output elements that were not written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills the memory that torch.empty and the C++ ops allocate: floats with NaN, integers with their maximum."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def default_algorithms(device: torch.device) -> Iterator[None]:
    """Turns off deterministic algorithms inside `poisoned`, so that ops run as users run them.

    This also turns off poisoning. On CUDA the allocator's free memory is therefore filled with NaN instead, in large
    and in small blocks, of which new tensors are cut.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        sizes = [1 << 24, *[1 << 17] * 64]  # 64 MiB, and 64 blocks of 512 KiB
        blocks = [torch.full((size,), float("nan"), device=device) for size in sizes]
        del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
