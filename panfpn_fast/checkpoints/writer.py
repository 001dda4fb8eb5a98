"""Writes checkpoints in the native format and in the layouts of detectron2 and mmdetection."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.checkpoints import detectron2, mmdetection, native
from panfpn_fast.checkpoints.reader import KEY
from panfpn_fast.data.categories import Categories
from panfpn_fast.models.panoptic_fpn import PanopticFPN

SUFFIXES: dict[str, tuple[str, ...]] = {
    "native": (".safetensors", ".pth"),
    "detectron2": (".pkl", ".pth"),
    "mmdetection": (".pth",),
}
"""Allowed file name suffixes of each layout."""


def save(model: PanopticFPN, path: str | os.PathLike[str], layout: str | None = None) -> None:
    """Saves a network to a checkpoint that `panfpn_fast.load` reads without further arguments.

    The file appears under its name only when it is complete. Missing folders of its path are made.

    Args:
        model: The network.
        path: The file, with suffix `.safetensors`, `.pth` or `.pkl`. An existing file is replaced.
        layout: `"native"`, `"detectron2"` or `"mmdetection"`. None selects detectron2 for `.pkl`, else native.

    Raises:
        TypeError: If `model` is not a `PanopticFPN`.
        ValueError: If the layout is unknown, does not allow the suffix, or cannot hold this network.
        ImportError: If the suffix is `.safetensors` and the package safetensors is not installed.
        OSError: If the file cannot be written.

    Note:
        The native format keeps the dtype; the other layouts are written in float32. Every file contains the settings
        (including preprocessing) and the names and colors of the classes. detectron2 and mmdetection ignore them and
        take theirs from their own configurations.

    Example:
        >>> panfpn_fast.save(model, "model.safetensors")  # doctest: +SKIP
    """
    if not isinstance(model, PanopticFPN):
        raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}")
    path = Path(path)
    layout = prepare(path, layout)
    description = native.description_of(model.config)
    if layout == "native":
        content = native.content_of(model.state_dict(), model.config)
    elif layout == "detectron2":
        # detectron2 takes a .pkl file without an author for a Caffe2 model and renames its tensors.
        content = {
            "model": detectron2.tensors(model),
            "__author__": "panfpn_fast",
            **native.attach(description),
        }
    else:
        meta = {**_dataset_meta(model.config.categories), **native.attach(description)}
        content = {"state_dict": mmdetection.tensors(model), "meta": meta}
    _write(path, content)


def prepare(path: Path, layout: str | None, name: str = "path") -> str:
    """Checks that a checkpoint can be written, and makes the folder of its path.

    Args:
        path: The file.
        layout: See `save`.
        name: Name of the argument `path` in error messages.

    Returns:
        The layout that `save` writes.

    Raises:
        ValueError: If the layout is unknown or does not allow the suffix.
        OSError: If the path is a folder, or its folder cannot be made or written to.
    """
    if layout is None:
        layout = "detectron2" if path.suffix == ".pkl" else "native"
    if layout not in SUFFIXES:
        raise ValueError(f"layout: expected one of {', '.join(SUFFIXES)}, got {layout!r}")
    if path.suffix not in SUFFIXES[layout]:
        raise ValueError(
            f"{path}: a checkpoint in the {layout} layout needs the suffix {' or '.join(SUFFIXES[layout])}"
        )
    prepare_file(path, name)
    return layout


def _write(path: Path, content: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save as to_bytes
        except ImportError as error:
            raise ImportError(f"{path}: {error}. Install the package: pip install safetensors") from error
        metadata = {KEY: json.dumps({name: value for name, value in content.items() if name != "model"})}
        data = to_bytes(content["model"], {"format": "pt", **metadata})
        with atomic_write(path) as file:
            file.write(data)
    elif path.suffix == ".pkl":
        arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
        with atomic_write(path) as file:
            pickle.dump({**content, "model": arrays}, file, protocol=4)
    else:
        with atomic_write(path) as file:
            torch.save(content, file)


def _dataset_meta(categories: Categories) -> Mapping[str, Any]:
    """Returns the classes as mmdetection 3 stores them in a checkpoint."""
    names = {
        "classes": [c.name for c in categories.all],
        "thing_classes": [c.name for c in categories.things],
        "stuff_classes": [c.name for c in categories.stuff],
    }
    return {"dataset_meta": {**names, "palette": [tuple(c.color) for c in categories.all]}}
