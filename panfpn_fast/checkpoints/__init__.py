"""Checkpoints: published ones by name, files of any kind by their content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import detectron2, hub, mmdetection, own, reader
from panfpn_fast.checkpoints.hub import DownloadError
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.checkpoints.writer import save
from panfpn_fast.models.config import BACKBONES, PanopticFPNConfig, presets
from panfpn_fast.models.panoptic_fpn import BRANCHES, PanopticFPN

__all__ = ["CheckpointError", "DownloadError", "load", "save"]


def load(path_or_name: str | os.PathLike[str], **overrides: Any) -> PanopticFPN:
    """Makes a network from a checkpoint.

    The file's content tells which framework wrote it (detectron2, mmdetection, or this package), the backbone's
    depth and the number of classes. The network is set up as that framework runs it. Nothing in the file is run.

    Args:
        path_or_name: a file, or a published checkpoint's name such as
            ``"detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"`` or
            ``"mmdetection://panoptic_fpn_r50_fpn_1x_coco"``, which is downloaded once (see
            :mod:`panfpn_fast.checkpoints.hub` for where it is kept).
        **overrides: fields of :class:`PanopticFPNConfig`, for example ``score_threshold=0.2``, or what the
            tensors of other frameworks cannot tell: ``stride_in_1x1=False``. ``tasks=("instance",)`` takes one branch
            alone.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        TypeError: an override that is no setting.
        ValueError: an unknown name, an override's value that a setting cannot take, or (``CheckpointError``)
            a file that is damaged, of an unknown kind, asks for code to be run, or whose tensors do not fit.
        OSError: the file cannot be read or (``DownloadError``) the download failed.
        ImportError: the file is a .safetensors file, or its backbone torchvision's or timm's, and the package for
            that is not installed.
    """
    PanopticFPNConfig().replace(**overrides)  # a misspelt setting should not wait for a download
    path = _find(path_or_name)
    content = reader.read(path)
    # What is no dictionary of tensors is told here, with the file's name.
    weights = {} if own.is_own(content) else _weights(path, content)
    try:
        model = _foreign(content, weights, overrides) if weights else _own(content, overrides)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval()


def _foreign(
    content: Mapping[str, Any], weights: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PanopticFPN:
    """Makes the network that detectron2 or mmdetection wrote, or that we wrote for them."""
    framework = mmdetection if mmdetection.is_mmdetection(weights) else detectron2
    settings = framework.settings(weights) | own.attached_settings(content) | dict(overrides)
    config = PanopticFPNConfig().replace(**settings)
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        model = PanopticFPN.from_config(config)
    framework.fill(model, weights)
    return model


def _own(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPN:
    """Makes the network that this package wrote."""
    config = PanopticFPNConfig().replace(**{**own.settings(content), **overrides})
    # As above; the other libraries' networks have buffers that they compute and do not save.
    with torch.device("meta") if config.backbone in BACKBONES else nullcontext():
        model = PanopticFPN.from_config(config)
    try:
        absent = tuple(
            f"{part}." for task in BRANCHES if task not in model.config.tasks for part in BRANCHES[task]
        )
        weights = {
            name: value.float() if value.is_floating_point() else value
            for name, value in content["model"].items()
            if not name.startswith(absent)
        }
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"its tensors do not fit: {error}") from error
    return model


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_name)
    if not isinstance(name, str):
        raise TypeError(f"path_or_name: expected a string or path, got {type(name).__name__}")
    if "://" in name:
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
    """Returns the tensors by name, if they are those of a network of detectron2's or mmdetection's."""
    weights = content
    if isinstance(content, Mapping):
        levels = [content[name] for name in ("model", "state_dict") if name in content]
        weights = next((level for level in levels if isinstance(level, Mapping)), content)
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: no dictionary of tensors by name, but {type(content).__name__}")
    # Written from inside DistributedDataParallel.
    prefix = "module." if weights and all(name.startswith("module.") for name in weights) else ""
    named = {name.removeprefix(prefix): value for name, value in weights.items()}
    if "conv1_w" in named or "stem.conv1.weight" in named:
        raise CheckpointError(
            f"{path}: the weights of a backbone alone, not of a panoptic segmentation network"
        )
    if not detectron2.is_detectron2(named) and not mmdetection.is_mmdetection(named):
        names = ", ".join(list(named)[:4]) or "nothing"
        raise CheckpointError(
            f"{path}: not the layout of a checkpoint of detectron2's or mmdetection's; it holds {names} ..."
        )
    return named
