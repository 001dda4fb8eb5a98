"""A small network and functions that write it as checkpoints of detectron2 and mmdetection."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from panfpn_fast.checkpoints import detectron2, mmdetection
from panfpn_fast.models import PanopticFPN

Weights = dict[str, npt.NDArray[np.float32]]

SMALL: dict[str, Any] = {
    "num_things": 3,
    "num_stuff": 4,
    "fpn_channels": 32,
    "box_head_channels": 16,
    "mask_head_channels": 8,
    "semantic_channels": 32,
}


@functools.cache
def small_network() -> PanopticFPN:
    """Returns a network that all tests share and must not change."""
    torch.manual_seed(0)
    model = PanopticFPN(**SMALL).eval()
    for buffer in model.backbone.buffers():
        buffer.uniform_(0.5, 1.5)
    return model


def small_weights() -> Weights:
    """Returns the tensors of the network by detectron2's names. Tests may change the dictionary, not the arrays."""
    return {detectron2.key(name): value.numpy() for name, value in small_network().state_dict().items()}


def small_mmdetection_weights() -> Weights:
    """Returns the tensors of the network and its counters by mmdetection's names."""
    return {name: value.numpy() for name, value in mmdetection.tensors(small_network()).items()}


def save_pickle(path: Path, content: Any, protocol: int = 4) -> Path:
    """Writes a .pkl file as detectron2's checkpointer does."""
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def save_torch(path: Path, weights: Weights, legacy: bool = False, **extra: Any) -> Path:
    """Writes a .pth file as detectron2's checkpointer does, or in the format before PyTorch 1.6 if `legacy`."""
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    content = {"model": OrderedDict(tensors), **extra}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def save_mmdetection(path: Path, weights: Weights, **meta: Any) -> Path:
    """Writes a checkpoint as mmdetection's training does."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}
    torch.save({"meta": meta, "state_dict": OrderedDict(tensors)}, path)
    return path


def shared_folder() -> Path:
    """Returns the directory of photographs and goldens, or skips the test.

    The directory is `$PANFPN_SHARED`, else `shared` next to the repository.
    """
    folder = Path(os.environ.get("PANFPN_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    if not (folder / "goldens").is_dir():
        pytest.skip(f"{folder} has no goldens; set PANFPN_SHARED to the directory that has them")
    return folder


def seeded_weights(case: str, deeper: bool = False) -> Weights:
    """Returns the random weights of a golden case by the framework's names.

    Args:
        case: A directory in `goldens`.
        deeper: Whether res4 gets the 23 blocks of an R-101 instead of 6. The same rules fill them, but each block adds
            half as much, so that scores do not saturate at 1, where their order is arbitrary.
    """
    goldens = shared_folder() / "goldens"
    spec = json.loads((goldens / case / "keys.json").read_text())
    keys: dict[str, list[int]] = dict(spec["keys"])
    prefix = "backbone.bottom_up.res4."
    if deeper:
        for name, shape in spec["keys"].items():
            if name.startswith(f"{prefix}1."):
                keys |= {name.replace(f"{prefix}1.", f"{prefix}{block}."): shape for block in range(6, 23)}
    fill = _module(goldens / "seeded_weights.py").fill
    weights = {name: fill(name, tuple(shape), spec["rules"]) for name, shape in keys.items()}
    if deeper:
        for name in weights:
            if name.startswith(prefix) and name.endswith("conv3.norm.weight"):
                weights[name] *= np.float32(0.5)
    return weights


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
