"""The weights that training begins with: a whole network's, or a ResNet's from ImageNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints import hub, load, own, reader
from panfpn_fast.checkpoints.detectron2 import is_detectron2
from panfpn_fast.checkpoints.reader import CheckpointError
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


def _from_torchvision(weights: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in weights.items():
        for pattern, ours in _TORCHVISION:
            name = re.sub(pattern, ours, name)
        found[name] = value
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
        found[{"w": f"{conv}.weight", "bn_s": f"{norm}.weight", "bn_b": f"{norm}.bias"}[kind]] = value
    return found


def initialize(model: PanopticFPN, path_or_name: str) -> list[str]:
    """Puts weights into a network as far as they fit.

    Args:
        model: The network; what has no weights keeps its own.
        path_or_name: A checkpoint that `panfpn_fast.load` takes, or a file with a ResNet of torchvision's or of
            detectron2's (Caffe2) naming.

    Returns:
        What was not taken over and why, to be shown.

    Raises:
        CheckpointError: Nothing in the file fits; names the file.
    """
    if "://" in path_or_name and "ImageNetPretrained" not in path_or_name:
        return _copy(model, load(path_or_name).state_dict(), path_or_name)
    path = hub.fetch(path_or_name) if "://" in path_or_name else Path(path_or_name)
    content = reader.read(path)
    if own.is_own(content):
        return _copy(model, content["model"], str(path))
    weights = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else {}
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(f"{path}: no dictionary of tensors by name")
    if is_detectron2(weights):
        return _copy(model, load(path).state_dict(), str(path))
    backbone = _from_caffe2(weights) if "conv1_w" in weights else _from_torchvision(weights)
    return _copy(model, {f"backbone.{name}": value for name, value in backbone.items()}, str(path))


def _copy(model: PanopticFPN, weights: Mapping[str, Any], source: str) -> list[str]:
    taken, reshaped = 0, []
    state = model.state_dict()
    for name, value in weights.items():
        if name not in state:
            continue
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
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
