"""Loads checkpoints, published ones by name and files by their content, and saves them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from panfpn_fast.checkpoints import detectron2, hub, mmdetection, native, reader, wrappers
from panfpn_fast.checkpoints.hub import DownloadError
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.checkpoints.writer import save
from panfpn_fast.data.categories import to_categories
from panfpn_fast.models.config import BACKBONES, TASKS, PanopticFPNConfig
from panfpn_fast.models.panoptic_fpn import BRANCHES, PanopticFPN

__all__ = ["CheckpointError", "DownloadError", "load", "read_config", "save"]


def load(path_or_name: str | os.PathLike[str], **overrides: Any) -> PanopticFPN:
    """Loads a network from a checkpoint.

    The framework that wrote the file (detectron2, mmdetection or this package), the depth of the backbone and the
    number of classes are recognized by the content of the file. The network is configured as that framework runs it.
    Prefixes that wrappers such as DistributedDataParallel and torch.compile add to the names of tensors are removed. No
    code in the file is run.

    Args:
        path_or_name: A file, also a `checkpoint_*.pth` of a training run, or the name of a published checkpoint such as
            `"detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"` or
            `"mmdetection://panoptic_fpn_r50_fpn_1x_coco"`, or its last part, such as `"panoptic_fpn_R_50_3x"`. It is
            downloaded once to `$PANFPN_CACHE`, else `$XDG_CACHE_HOME/panfpn_fast`, else `~/.cache/panfpn_fast`.
        **overrides: Fields of `PanopticFPNConfig`, for example `score_threshold=0.2`, or `stride_in_1x1=False`, which
            the tensors of other frameworks do not show. `tasks=("instance",)` loads only one branch. `categories` names
            the classes of a checkpoint that has no names.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If an override is not a field of `PanopticFPNConfig`.
        ValueError: If no published checkpoint has the name, or an override has an invalid value. `CheckpointError`,
            a subclass, is raised if the file is damaged, has an unknown format, would run code, or has tensors that do
            not fit the network.
        OSError: If the file cannot be read. `DownloadError`, a subclass, is raised if the download fails.
        ImportError: If a .safetensors file or a backbone of torchvision or timm needs a package that is not installed.
    """
    PanopticFPNConfig().replace(**overrides)  # reports a misspelt setting before the download
    path = hub.find(path_or_name)
    content = reader.read(path)
    weights = {} if native.is_native(content) else _weights(path, content)
    try:
        model = _from_framework(content, weights, overrides) if weights else _from_native(content, overrides)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval()


def read_config(path_or_name: str | os.PathLike[str]) -> PanopticFPNConfig:
    """Reads the settings of the network in a checkpoint; for the arguments and errors, see `load`."""
    path = hub.find(path_or_name)
    content = reader.read(path)
    weights = {} if native.is_native(content) else _weights(path, content)
    try:
        settings = _framework_settings(content, weights) if weights else native.settings(content)
        return PanopticFPNConfig().replace(**settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _framework_settings(content: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a checkpoint in the layout of detectron2 or mmdetection."""
    framework = mmdetection if mmdetection.is_mmdetection(weights) else detectron2
    settings: dict[str, Any] = framework.settings(weights)
    if framework is mmdetection:
        settings |= mmdetection.categories(content, settings)
    return settings | native.attached_settings(content)


def _from_framework(
    content: Mapping[str, Any], weights: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PanopticFPN:
    """Makes the network from a checkpoint in the layout of detectron2 or mmdetection."""
    framework = mmdetection if mmdetection.is_mmdetection(weights) else detectron2
    config = _configure(_framework_settings(content, weights), overrides)
    with torch.device("meta"):  # `fill` replaces all tensors, so they need neither memory nor random numbers
        model = PanopticFPN.from_config(config)
    framework.fill(model, weights)
    return model


def _configure(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPNConfig:
    """Returns the settings of a checkpoint with overrides, whose classes must fit the network."""
    chosen = {**settings, **overrides}
    if overrides.get("categories") is not None:
        categories = to_categories(overrides["categories"])
        for task, count, kind in (("instance", "num_things", "thing"), ("semantic", "num_stuff", "stuff")):
            given = len(categories.things if kind == "thing" else categories.stuff)
            if task in chosen.get("tasks", TASKS) and settings.get(count, given) != given:
                raise ValueError(
                    f"categories: expected {settings[count]} {kind} classes, as many as the network has; "
                    f"{categories.name!r} has {given}"
                )
            if count not in overrides:
                chosen.pop(count, None)
    return PanopticFPNConfig().replace(**chosen)


def _from_native(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> PanopticFPN:
    """Makes the network from a checkpoint in the native format."""
    config = _configure(native.settings(content), overrides)
    # Backbones of other libraries have computed buffers that are not in the state dict, so they need real memory.
    with torch.device("meta" if config.backbone in BACKBONES else "cpu"):
        model = PanopticFPN.from_config(config)
    try:
        absent = tuple(
            f"{part}." for task in BRANCHES if task not in model.config.tasks for part in BRANCHES[task]
        )
        weights = {
            name: value.float() if value.is_floating_point() else value
            for name, value in native.weights(content).items()
            if not name.startswith(absent)
        }
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the tensors do not fit the network of the settings: {error}") from error
    return model


def _weights(path: Path, content: object) -> Mapping[str, Any]:
    """Returns the tensors by name; raises CheckpointError if the names are not of detectron2 or mmdetection."""
    weights = wrappers.find_weights(content, _is_known)
    if weights is None:
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors with string keys, got {type(content).__name__}"
        )
    if not _is_known(weights):
        if _is_backbone(weights):
            raise CheckpointError(
                f"{path}: the file has only the weights of a backbone. "
                f"Train with them: panfpn-fast train init={path}"
            )
        names = ", ".join(list(weights)[:4]) or "(none)"
        raise CheckpointError(
            f"{path}: not a checkpoint of panfpn_fast, detectron2 or mmdetection; its first entries are {names}"
        )
    return weights


def _is_known(names: Collection[str]) -> bool:
    return detectron2.is_detectron2(names) or mmdetection.is_mmdetection(names)


def _is_backbone(names: Collection[str]) -> bool:
    """Returns whether the names are those of a ResNet of Caffe2 or detectron2."""
    return "conv1_w" in names or "stem.conv1.weight" in names
