"""A run's state on disk: complete or not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_NAME = "checkpoint_{step:08d}.pth"
_PATTERN = "checkpoint_*.pth"


def save_atomically(content: Any, path: Path) -> None:
    """torch.save to a file that appears under its name only when it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoints:
    """The newest checkpoints of a run.

    Args:
        folder: Where they lie.
        keep: How many stay; older ones are deleted after a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state after `step` steps."""
        path = self.folder / _NAME.format(step=step)
        save_atomically({"step": step, **state}, path)
        for old in self._paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """Reads the newest one, or returns None where there is none.

        Raises:
            ValueError: It cannot be read; names it.
        """
        paths = self._paths()
        if not paths:
            return None
        try:
            state: dict[str, Any] = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            raise ValueError(f"{paths[-1]}: cannot be read as a checkpoint: {error}") from error
        return state

    def exist(self) -> bool:
        """Whether there is one."""
        return bool(self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN))
