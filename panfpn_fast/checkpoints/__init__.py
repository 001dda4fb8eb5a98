"""Checkpoints: published ones by name, files of any kind by their content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import detectron2, hub, own, reader
from panfpn_fast.checkpoints.hub import DownloadError
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.models.config import PanopticFPNConfig, presets
from panfpn_fast.models.panoptic_fpn import BRANCHES, PanopticFPN

__all__ = ["CheckpointError", "DownloadError", "load"]


def load(path_or_name: str | os.PathLike[str], **overrides: Any) -> PanopticFPN:
    """Makes a network from a checkpoint.

    The file's content tells which framework wrote it (detectron2, or our own training), the backbone's depth
    and the number of classes. It is read without running anything in it.

    Args:
        path_or_name: a file, or a published checkpoint's name such as
            ``"detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"``, which is downloaded once (see
            :mod:`panfpn_fast.checkpoints.hub` for where it is kept).
        **overrides: fields of :class:`PanopticFPNConfig`, for example ``score_threshold=0.2``, or what the
            tensors cannot tell: ``stride_in_1x1=False``. ``tasks=("instance",)`` takes one branch alone.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an override that is no setting.
        ValueError: an unknown name, an override's value that a setting cannot take, or (``CheckpointError``)
            a file that is damaged, of an unknown kind, asks for code to be run, or whose tensors do not fit.
        OSError: the file cannot be read or (``DownloadError``) the download failed.
    """
    PanopticFPNConfig().replace(**overrides)  # a misspelt setting should not wait for a download
    path = _find(path_or_name)
    content = reader.read(path)
    # What is no dictionary of tensors is told here, with the file's name.
    weights = {} if own.is_own(content) else _weights(path, content)
    try:
        model = _detectron2(weights, overrides) if weights else _own(content, overrides)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval()


def _detectron2(weights: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPN:
    """Makes the network that detectron2 wrote."""
    config = PanopticFPNConfig().replace(**{**detectron2.settings(weights), **overrides})
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = PanopticFPN.from_config(config)
    detectron2.fill(model, weights)
    return model


def _own(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPN:
    """Makes the network that our training wrote."""
    model = PanopticFPN(**{**own.settings(content), **overrides})
    try:
        absent = tuple(
            f"{part}." for task in BRANCHES if task not in model.config.tasks for part in BRANCHES[task]
        )
        weights = {name: value for name, value in content["model"].items() if not name.startswith(absent)}
        model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"its tensors do not fit: {error}") from error
    return model


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_name)
    if not isinstance(name, str):
        raise TypeError(f"path_or_name: expected a string or path, got {type(name).__name__}")
    if "://" in name:
        if name.startswith("mmdetection://"):
            raise ValueError(f"{name}: mmdetection checkpoints are not supported yet, detectron2's are")
        return hub.fetch(name)
    path = Path(name)
    if path.exists():
        return path
    if name in presets:
        raise FileNotFoundError(
            f"{name}: no such file. It is a preset, a network without trained weights: "
            f"PanopticFPN.from_config({name!r})"
        )
    raise FileNotFoundError(f"{name}: no such file. Published checkpoints: {', '.join(hub.PUBLISHED)}")


def _weights(path: Path, content: object) -> dict[str, Any]:
    """Returns the tensors by name, if they are those of a detectron2 network."""
    weights = content
    if isinstance(content, Mapping):
        levels = [content[name] for name in ("model", "state_dict") if name in content]
        weights = next((level for level in levels if isinstance(level, Mapping)), content)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: no dictionary of tensors by name, but {type(content).__name__}")
    # Written from inside DistributedDataParallel.
    prefix = "module." if weights and all(name.startswith("module.") for name in weights) else ""
    named = {name.removeprefix(prefix): value for name, value in weights.items()}
    if "neck.lateral_convs.0.conv.weight" in named:
        raise CheckpointError(
            f"{path}: an mmdetection checkpoint; these are not supported yet, detectron2's are"
        )
    if "conv1_w" in named or "stem.conv1.weight" in named:
        raise CheckpointError(
            f"{path}: the weights of a backbone alone, not of a panoptic segmentation network"
        )
    if not detectron2.is_detectron2(named):
        names = ", ".join(list(named)[:4]) or "nothing"
        raise CheckpointError(f"{path}: not the layout of a detectron2 checkpoint; it holds {names} ...")
    return named
