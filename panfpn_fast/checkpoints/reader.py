"""Reads checkpoint files of every format without running code in them."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import restricted_pickle

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files that torch.save wrote before PyTorch 1.6: a pickled magic number."""
_PICKLE_STARTS = (b"\x80", b"(", b"}", b"]", b"c")

KEY = "panfpn_fast"
"""Marks the native format: a key of the dictionary, or of the metadata of a .safetensors file."""

# Objects beside the weights in the checkpoints of training runs. They are discarded, and nothing of them runs.
_LEFT_OUT = (
    # Histories of mmengine's log, which hold arrays and name their own methods.
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
    "builtins.getattr",  # protocol 2 writes a method as getattr(class, name)
    # Arguments and settings of a run. Types of the latter hold their parts and the types of their values.
    "argparse.Namespace",
    "datetime.datetime",
    "datetime.timedelta",
    *(
        f"pathlib{inner}.{name}"
        for inner in ("", "._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    ),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    "typing.Any",
    *(
        f"builtins.{name}"
        for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")
    ),
)
# Dictionaries beside the weights, which become plain ones.
_DICTIONARIES = (
    "addict.addict.Dict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the defect."""


class _LeftOut:
    """Replaces the objects in `_LEFT_OUT`; discards their arguments and their state."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _empty(*args: object) -> dict[Any, Any]:
    """Replaces `collections.defaultdict`, whose argument would make the values."""
    return {}


_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_LeftOut, name) for name in _LEFT_OUT),
    *((OrderedDict, name) for name in _DICTIONARIES),
    (_empty, "collections.defaultdict"),
]


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint file. The content determines the format; the file name does not matter.

    Args:
        path: A file written by `torch.save`, `pickle.dump` or safetensors.

    Returns:
        The object in the file, usually a dictionary, with tensors on the CPU. A .safetensors file gives a dictionary
        with the tensors as "model" and, if the file is in the native format, the entries of its metadata.

    Raises:
        FileNotFoundError: If the file does not exist.
        CheckpointError: If the file is damaged, has another format, or would run code.
        ImportError: If the file is a .safetensors file and the package safetensors is not installed.
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
            raise CheckpointError(
                f"{path}: not a checkpoint: expected a pickle, a file of torch.save or a .safetensors file"
            )
        try:
            return restricted_pickle.load(file)
        except restricted_pickle.RefusedGlobalError as error:
            raise _refused(path, str(error)) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise _refused(path, refused[1]) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint: {reason}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: {error}. Install the package: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(KEY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable .safetensors file: {error}") from error
    return {**(described if isinstance(described, Mapping) else {}), "model": weights}


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused: the file asks for {name!r}. Only tensors, arrays and plain containers are read, because "
        "other objects can run code. Save the state dict alone in the environment that wrote the file."
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= size
