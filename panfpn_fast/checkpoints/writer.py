"""Writes checkpoints: our own, and those of detectron2 and mmdetection where they have such a network."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import detectron2, mmdetection, own
from panfpn_fast.checkpoints.reader import KEY
from panfpn_fast.data.categories import Categories, get_categories
from panfpn_fast.inference.coco_format import atomic_write
from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.models.panoptic_fpn import PanopticFPN

SUFFIXES: dict[str, tuple[str, ...]] = {
    "own": (".safetensors", ".pth"),
    "detectron2": (".pkl", ".pth"),
    "mmdetection": (".pth",),
}
"""What files of each layout end in."""


def save(model: PanopticFPN, path: str | os.PathLike[str], layout: str | None = None) -> None:
    """Writes a checkpoint, complete or not at all; ``panfpn_fast.load`` reads it and needs nothing else.

    Args:
        model: a network.
        path: where to; a file that is there is replaced. ``.safetensors``, ``.pth`` or ``.pkl``.
        layout: ``"own"``, ``"detectron2"`` or ``"mmdetection"``; None: detectron2's for ``.pkl``, else our own.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: no such layout, it has no files of this kind, or its framework has no such network.
        ImportError: ``.safetensors`` without the package safetensors.
        OSError: the file cannot be written.

    Note:
        Our own format keeps the dtype, the others get float32. Settings (preprocessing among them), class names and
        colours are in every file, though only we read them in the other frameworks' files: to these, their own
        configurations say how a network runs.
    """
    if not isinstance(model, PanopticFPN):
        raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}")
    path = Path(path)
    if layout is None:
        layout = "detectron2" if path.suffix == ".pkl" else "own"
    if layout not in SUFFIXES:
        raise ValueError(f"layout: expected one of {', '.join(SUFFIXES)}, got {layout!r}")
    if path.suffix not in SUFFIXES[layout]:
        kind = "our own" if layout == "own" else f"{layout}'s"
        raise ValueError(f"{path}: {kind} checkpoints end in {' or '.join(SUFFIXES[layout])}")
    categories = categories_of(model.config)
    description = own.description_of(dataclasses.asdict(model.config), categories)
    if layout == "own":
        content = own.content_of(model.state_dict(), dataclasses.asdict(model.config), categories)
    elif layout == "detectron2":
        # It takes a .pkl for one of its own by the author.
        content = {
            "model": detectron2.tensors(model),
            "__author__": "panfpn_fast",
            **own.attach(description),
        }
    else:
        meta = {**_dataset_meta(categories), **own.attach(description)}
        content = {"state_dict": mmdetection.tensors(model), "meta": meta}
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save as to_bytes
        except ImportError as error:
            raise ImportError(
                f'{path}: {error}. Such files need: pip install "panfpn_fast[safetensors]"'
            ) from error
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


def categories_of(config: PanopticFPNConfig) -> Categories | None:
    """The classes of the data set, if it has as many as the network."""
    try:
        found = get_categories(config.dataset)
    except ValueError:
        return None
    counts = (len(found.things), len(found.stuff))
    return found if counts == (config.num_things, config.num_stuff) else None


def _dataset_meta(categories: Categories | None) -> Mapping[str, Any]:
    """How mmdetection 3 names classes in a checkpoint."""
    if categories is None:
        return {}
    names = {
        "classes": [c.name for c in categories.all],
        "thing_classes": [c.name for c in categories.things],
        "stuff_classes": [c.name for c in categories.stuff],
    }
    return {"dataset_meta": {**names, "palette": [tuple(c.color) for c in categories.all]}}
