"""A stand-in for a GPU with CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class HostGpu:
    """Computes on the CPU. A replay writes to the same memory as the capture, like on a GPU.

    Attributes:
        log: The names of what was called.
        stage: The last of "submitting", "replaying", "replayed" and "waited" to begin.
    """

    device = torch.device("cpu")
    pins_memory = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stage = "submitting"

    def active(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.log.append("capture")
        outputs = run()

        def replay() -> None:
            self.log.append("replay")
            self.stage = "replaying"
            for kept, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if kept is not None:
                    kept.copy_(new)
            self.stage = "replayed"

        return outputs, replay

    def run_both(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        other = second()
        return first(), other

    def wait(self) -> None:
        self.log.append("wait")
        self.stage = "waited"
