"""The weights that training begins with: a whole network's, or a ResNet's from ImageNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints import detectron2, hub, mmdetection, own, reader
from panfpn_fast.checkpoints.layout import Layout
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.panoptic_fpn import PanopticFPN

# torchvision's names and ours.
_TORCHVISION = (
    (r"^bn(\d)\.", r"norm\1."),
    (r"^(layer\d\.\d+)\.bn(\d)\.", r"\1.norm\2."),
    (r"^(layer\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    (r"^(layer\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
)
# Caffe2's names, of detectron2's MSRA models, and ours. Its normalisations have a scale and a shift alone.
_CAFFE2_BRANCH = {"2a": "1", "2b": "2", "2c": "3"}

# What the networks of each were trained with.
_IMAGENET = {
    "stride_in_1x1": False,
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
_MSRA = {
    "stride_in_1x1": True,
    "channel_order": "BGR",
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
}


def _from_torchvision(weights: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in weights.items():
        for pattern, ours in _TORCHVISION:
            name = re.sub(pattern, ours, name)
        found[f"backbone.{name}"] = value
    return found


def _from_caffe2(weights: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in weights.items():
        stem = re.fullmatch(r"(?:res_)?conv1_(w|bn_s|bn_b)", name)
        block = re.fullmatch(r"res(\d)_(\d+)_branch(1|2[abc])_(w|bn_s|bn_b)", name)
        if stem:
            conv, norm, kind = "conv1", "norm1", stem[1]
        elif block:
            prefix = f"layer{int(block[1]) - 1}.{block[2]}"
            if block[3] == "1":
                conv, norm = f"{prefix}.shortcut.conv", f"{prefix}.shortcut.norm"
            else:
                number = _CAFFE2_BRANCH[block[3]]
                conv, norm = f"{prefix}.conv{number}", f"{prefix}.norm{number}"
            kind = block[4]
        else:
            continue
        ours = {"w": f"{conv}.weight", "bn_s": f"{norm}.weight", "bn_b": f"{norm}.bias"}[kind]
        found[f"backbone.{ours}"] = value
    return found


def _renamed(
    model: PanopticFPN, weights: Mapping[str, Any], layout: Layout, omitted: str = ""
) -> dict[str, Any]:
    """Renames another framework's tensors; `omitted` is what the file's names lack at their front."""
    found = {}
    for name in model.state_dict():
        try:
            theirs = layout.key(name).removeprefix(omitted)
        except KeyError:  # a part that the framework's network does not have
            continue
        if theirs in weights:
            found[name] = weights[theirs]
    return found


def _backbone(model: PanopticFPN, weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A backbone's tensors by our names, and what is wrong with using them."""
    if isinstance(model.backbone, FeatureExtractor):
        return {f"backbone.body.{name}": value for name, value in weights.items()}, []
    if "conv1_w" in weights:
        found, wanted = _from_caffe2(weights), _MSRA
    elif "stem.conv1.weight" in weights:
        # detectron2 has torchvision's converted so; which of the two inputs it wants is not in the file.
        found, wanted = _renamed(model, weights, detectron2.LAYOUT, "backbone.bottom_up."), {}
    else:
        found, wanted = _from_torchvision(weights), _IMAGENET
    messages = []
    if model.config.backbone_norm == "gn":
        found = {name: value for name, value in found.items() if ".norm" not in name}
        messages.append("GroupNorm cannot use the batch norms' values and begins anew")
    return found, messages + _differences(model, wanted)


def _differences(model: PanopticFPN, wanted: Mapping[str, Any]) -> list[str]:
    """Says where a network's settings are not those that weights were trained with."""
    mine = vars(model.config)
    return [
        f"warning: these weights were trained with {field}={value!r}, here it is {mine[field]!r}"
        for field, value in wanted.items()
        if mine[field] != value
    ]


def initialize(model: PanopticFPN, path_or_name: str) -> list[str]:
    """Puts weights into a network as far as they fit.

    Args:
        model: The network; what has no weights keeps its own.
        path_or_name: A checkpoint that `panfpn_fast.load` takes; a file with a ResNet of torchvision's, of Caffe2's or
            of detectron2's naming; one with the network of torchvision or timm that is the backbone; or
            "detectron2://ImageNetPretrained/MSRA/R-50.pkl" (R-101.pkl).

    Returns:
        What was taken over, what was not and why, and where the network's settings are not those that the weights were
        trained with; to be shown.

    Raises:
        CheckpointError: Nothing in the file fits; names the file.
    """
    path = hub.fetch(path_or_name) if "://" in path_or_name else Path(path_or_name)
    content = reader.read(path)
    if own.is_own(content):
        return _copy(model, content["model"], str(path))
    weights = content
    for level in ("model", "state_dict", "blobs"):
        if isinstance(weights, Mapping) and isinstance(weights.get(level), Mapping):
            weights = weights[level]
            break
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: no dictionary of tensors by name")
    if detectron2.is_detectron2(weights):
        return _copy(model, _renamed(model, weights, detectron2.LAYOUT), str(path))
    if mmdetection.is_mmdetection(weights):
        found = _renamed(model, mmdetection.things_first(weights), mmdetection.LAYOUT)
        return _copy(model, found, str(path)) + _differences(model, {**_IMAGENET, "resize": "mmdetection"})
    backbone, messages = _backbone(model, weights)
    return _copy(model, backbone, str(path)) + messages


def _copy(model: PanopticFPN, weights: Mapping[str, Any], source: str) -> list[str]:
    taken, reshaped = 0, []
    state = model.state_dict()
    for name, value in weights.items():
        if name not in state:
            continue
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensor.shape != state[name].shape:
            reshaped.append(f"{name}: {list(tensor.shape)}, here {list(state[name].shape)}")
            continue
        state[name].copy_(tensor)
        taken += 1
    if taken == 0:
        raise CheckpointError(f"{source}: none of its {len(weights)} tensors fits this network")
    messages = [f"{taken} of {len(state)} tensors are from {source}"]
    if reshaped:
        messages.append("other classes or sizes, so these begin at random: " + "; ".join(reshaped))
    return messages
