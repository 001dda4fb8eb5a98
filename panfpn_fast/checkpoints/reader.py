"""Opens a checkpoint file of any kind without running anything in it."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import restricted_pickle

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began its files before PyTorch 1.6: a pickled magic number."""
_PICKLE_STARTS = (b"\x80", b"(", b"}", b"]", b"c")

KEY = "panfpn_fast"
"""What marks our own format: an entry of the dictionary, or of a .safetensors file's metadata."""

# What mmdetection's training keeps beside the weights: histories of its log, which hold arrays.
_LEFT_OUT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class _LeftOut:
    """Stands where a file has something else than tensors and plain containers, of which nothing is read or run."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read(path: str | os.PathLike[str]) -> Any:
    """Reads what a checkpoint file holds. Its content tells the format; the extension does not matter.

    Args:
        path: a file written by ``torch.save``, ``pickle.dump`` or safetensors.

    Returns:
        The object in it, usually a dictionary; tensors are on the CPU. Of a .safetensors file, a dictionary whose
        "model" has the tensors; beside it, what our own format tells in the file's metadata.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, of another kind, or asks for code to be run.
        ImportError: a .safetensors file, without the package safetensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(16)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if head.startswith((_ZIP, _TORCH_LEGACY)):
            return _read_torch(path)
        if _is_safetensors(head, size):
            return _read_safetensors(path)
        if not head.startswith(_PICKLE_STARTS):
            raise CheckpointError(f"{path}: no checkpoint: neither a pickle nor a file that torch.save wrote")
        try:
            return restricted_pickle.load(file)
        except restricted_pickle.RefusedGlobalError as error:
            raise _refused(path, error.name) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in _LEFT_OUT]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch.load meets damaged files with many types; the cause stays attached.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise _refused(path, refused[1]) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f'{path}: {error}. Such files need: pip install "panfpn_fast[safetensors]"'
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(KEY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from error
    return {**(described if isinstance(described, Mapping) else {}), "model": weights}


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused: the file asks for {name!r}. A checkpoint is read as tensors, arrays and plain "
        "containers only, because anything else could run code."
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= size
