"""Initial weights for training: those of a whole network, or of a ResNet trained on ImageNet."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints import detectron2, hub, mmdetection, native, reader, wrappers
from panfpn_fast.checkpoints.layout import Layout
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.data.categories import class_list
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.panoptic_fpn import PanopticFPN

# Patterns of torchvision's names, and our names.
_TORCHVISION = (
    (r"^bn(\d)\.", r"norm\1."),
    (r"^(layer\d\.\d+)\.bn(\d)\.", r"\1.norm\2."),
    (r"^(layer\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    (r"^(layer\d\.\d+)\.downsample\.1\.", r"\1.shortcut.norm."),
)
# Branches of a block in Caffe2, which named detectron2's MSRA models, and the numbers of our convolutions. Its
# normalization layers have only a scale and a shift.
_CAFFE2_BRANCH = {"2a": "1", "2b": "2", "2c": "3"}

# The layers that have outputs for each class.
_OF_CLASSES = ("box_head.class_logits", "box_head.box_deltas", "mask_head.logits", "semantic_head.logits")

# The settings that the two families of weights were trained with.
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
    """Renames another framework's tensors; `omitted` is the prefix that the names in the file lack."""
    found = {}
    for name in model.state_dict():
        try:
            theirs = layout.key(name).removeprefix(omitted)
        except KeyError:  # the framework's network has no such part
            continue
        if theirs in weights:
            found[name] = weights[theirs]
    return found


def _backbone(model: PanopticFPN, weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a backbone's tensors under our names, and messages about mismatches."""
    if isinstance(model.backbone, FeatureExtractor):
        return {f"backbone.body.{name}": value for name, value in weights.items()}, []
    if "conv1_w" in weights:
        found, wanted = _from_caffe2(weights), _MSRA
    elif "stem.conv1.weight" in weights:
        # Converted by detectron2 from torchvision or Caffe2; the file does not say which input it expects.
        found, wanted = _renamed(model, weights, detectron2.LAYOUT, "backbone.bottom_up."), {}
    else:
        found, wanted = _from_torchvision(weights), _IMAGENET
    messages = []
    if model.config.backbone_norm == "gn":
        found = {name: value for name, value in found.items() if ".norm" not in name}
        messages.append("GroupNorm cannot use the values of the batch norms and keeps its initial values")
    return found, messages + _differences(model, wanted)


def _differences(model: PanopticFPN, wanted: Mapping[str, Any]) -> list[str]:
    """Lists the settings of a network that differ from those that the weights were trained with."""
    mine = vars(model.config)
    return [
        f"warning: these weights were trained with {field}={value!r}, here it is {mine[field]!r}"
        for field, value in wanted.items()
        if mine[field] != value
    ]


def initialize(model: PanopticFPN, path_or_name: str) -> list[str]:
    """Copies weights into a network as far as they fit.

    Args:
        model: The network; tensors without a counterpart in the file keep their values.
        path_or_name: A checkpoint that `panfpn_fast.load` reads; the state dict of such a network without its settings;
            a file with a ResNet, named as in torchvision, Caffe2 or detectron2; a file with the torchvision or timm
            network that is the backbone; or "detectron2://ImageNetPretrained/MSRA/R-50.pkl" (R-101.pkl). Prefixes that
            wrappers add to the names of tensors are removed.

    Returns:
        Messages for the user: which tensors were copied, which were not and why, and which settings differ from those
        that the weights were trained with.

    Raises:
        CheckpointError: If nothing in the file fits; the message names the file.
        OSError, ValueError: If there is no such file or name, see `hub.find`.
    """
    path = hub.find(path_or_name)
    content = reader.read(path)
    if native.is_native(content) and isinstance(content.get("model"), Mapping):
        return _copy(model, native.weights(content), str(path)) + _other_classes(model, content, path)
    weights = wrappers.find_weights(content, partial(_is_known, model))
    if not weights:
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors by name, got {type(content).__name__}"
        )
    if detectron2.is_detectron2(weights):
        return _copy(model, _renamed(model, weights, detectron2.LAYOUT), str(path))
    if mmdetection.is_mmdetection(weights):
        found = _renamed(model, mmdetection.things_first(weights), mmdetection.LAYOUT)
        return _copy(model, found, str(path)) + _differences(model, {**_IMAGENET, "resize": "mmdetection"})
    if _is_ours(model, weights):
        return _copy(model, weights, str(path))
    backbone, messages = _backbone(model, weights)
    return _copy(model, backbone, str(path)) + messages


def _other_classes(model: PanopticFPN, content: Mapping[str, Any], path: Path) -> list[str]:
    """Returns messages if the file's network has other classes, but as many, so that its heads were copied."""
    try:
        learned = native.settings(content)["categories"]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    mine = model.config.categories
    messages = []
    for theirs, ours in ((learned.things, mine.things), (learned.stuff, mine.stuff)):
        if len(theirs) == len(ours) and [c.name for c in theirs] != [c.name for c in ours]:
            messages.append(
                f"warning: {path} has other classes, and as many: {class_list(theirs)}, here {class_list(ours)}; each "
                "class starts from the weights of the class in its place"
            )
    return messages


def _is_known(model: PanopticFPN, names: Collection[str]) -> bool:
    """Returns whether tensors of these names can initialise a network or its backbone."""
    if detectron2.is_detectron2(names) or mmdetection.is_mmdetection(names):
        return True
    if _is_ours(model, names):
        return True
    found, _ = _backbone(model, dict.fromkeys(names))
    return not set(found).isdisjoint(model.state_dict())


def _is_ours(model: PanopticFPN, names: Collection[str]) -> bool:
    """Returns whether names are those of our network; names in the backbone may be the same in other frameworks."""
    return any(name.startswith("fpn.") and name in names for name in model.state_dict())


def _copy(model: PanopticFPN, weights: Mapping[str, Any], source: str) -> list[str]:
    taken, reshaped = 0, []
    other_classes: dict[str, str] = {}
    state = model.state_dict()
    for name, value in weights.items():
        if name not in state:
            continue
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            kind = getattr(value, "dtype", type(value).__name__)
            raise CheckpointError(f"{source}: {name}: expected a tensor, got {kind}")
        if value.shape != state[name].shape:
            layer, mine = name.rpartition(".")[0], state[name]
            if layer in _OF_CLASSES and value.shape[1:] == mine.shape[1:]:
                other_classes[layer] = f"{layer} ({len(value)} outputs there, {len(mine)} here)"
                continue
            reshaped.append(f"{name}: {list(value.shape)}, here {list(state[name].shape)}")
            continue
        state[name].copy_(value)
        taken += 1
    if taken == 0:
        raise CheckpointError(f"{source}: none of its {len(weights)} tensors fits this network")
    messages = [f"{taken} of {len(state)} tensors are from {source}"]
    if other_classes:
        messages.append(
            "these layers keep their random initial values, because the classes differ: "
            + ", ".join(other_classes.values())
        )
    if reshaped:
        messages.append(
            "these keep their random initial values, because their shapes differ: " + "; ".join(reshaped)
        )
    return messages
