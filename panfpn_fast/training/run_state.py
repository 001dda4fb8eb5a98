"""The state of a run on disk, as checkpoints that are complete or absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from panfpn_fast._errors import UserError, one_line
from panfpn_fast._files import atomic_write

_NAME = "checkpoint_{step:08d}.pth"
_PATTERN = re.compile(r"checkpoint_(\d{8,})\.pth")


class Checkpoints:
    """The newest checkpoints of a run.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of checkpoints to keep; older ones are deleted once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state after `step` steps."""
        path = self.folder / _NAME.format(step=step)
        with atomic_write(path, durable=True) as file:
            torch.save({"step": step, **state}, file)
        for old in self._paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, path: Path) -> Any:
        """Reads a checkpoint; its content is not checked.

        Raises:
            UserError: If it cannot be read; the message names the file.
        """
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises various types
            reason = f"{one_line(error):.80}"
            raise UserError(
                f"{path}: cannot be read as a checkpoint ({reason}); delete it to use an older one"
            ) from error

    @property
    def newest(self) -> Path | None:
        """File of the newest checkpoint, if there is one."""
        paths = self._paths()
        return paths[-1] if paths else None

    def _paths(self) -> list[Path]:
        """Returns the checkpoints by step; a copy that the user made under another name is not one of them."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("*.pth")
            if (match := _PATTERN.fullmatch(path.name))
        }
        return [path for _, path in sorted(found.items())]
