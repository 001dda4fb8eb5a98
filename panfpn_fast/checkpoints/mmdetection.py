"""Reads and writes the tensors of mmdetection's Panoptic FPN checkpoints, and sets its preprocessing and rules.

The semantics are those of mmdetection 3.3.0, `configs/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints.layout import Layout, float32
from panfpn_fast.data.categories import Categories, get_categories, numbered_categories
from panfpn_fast.models.panoptic_fpn import PanopticFPN

LAYOUT = Layout(
    framework="mmdetection",
    rules=(
        (r"backbone\.conv1\.(\w+)", r"backbone.conv1.\1"),
        (r"backbone\.norm1\.(\w+)", r"backbone.bn1.\1"),
        (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(\w+)", r"backbone.layer\1.\2.conv\3.\4"),
        (r"backbone\.layer(\d)\.(\d+)\.norm(\d)\.(\w+)", r"backbone.layer\1.\2.bn\3.\4"),
        (r"backbone\.layer(\d)\.(\d+)\.shortcut\.conv\.(\w+)", r"backbone.layer\1.\2.downsample.0.\3"),
        (r"backbone\.layer(\d)\.(\d+)\.shortcut\.norm\.(\w+)", r"backbone.layer\1.\2.downsample.1.\3"),
        (r"fpn\.lateral\.p(\d)\.(\w+)", r"neck.lateral_convs.{1-2}.conv.\2"),
        (r"fpn\.output\.p(\d)\.(\w+)", r"neck.fpn_convs.{1-2}.conv.\2"),
        (r"rpn\.conv\.(\w+)", r"rpn_head.rpn_conv.\1"),
        (r"rpn\.objectness\.(\w+)", r"rpn_head.rpn_cls.\1"),
        (r"rpn\.deltas\.(\w+)", r"rpn_head.rpn_reg.\1"),
        (r"box_head\.fc(\d)\.(\w+)", r"roi_head.bbox_head.shared_fcs.{1-1}.\2"),
        (r"box_head\.class_logits\.(\w+)", r"roi_head.bbox_head.fc_cls.\1"),
        (r"box_head\.box_deltas\.(\w+)", r"roi_head.bbox_head.fc_reg.\1"),
        (r"mask_head\.convs\.(\d+)\.(\w+)", r"roi_head.mask_head.convs.\1.conv.\2"),
        (r"mask_head\.deconv\.(\w+)", r"roi_head.mask_head.upsample.\1"),
        (r"mask_head\.logits\.(\w+)", r"roi_head.mask_head.conv_logits.\1"),
        (
            r"semantic_head\.levels\.p(\d)\.(\d+)\.conv\.(\w+)",
            r"semantic_head.conv_upsample_layers.{1-2}.conv.\2.conv.\3",
        ),
        (
            r"semantic_head\.levels\.p(\d)\.(\d+)\.norm\.(\w+)",
            r"semantic_head.conv_upsample_layers.{1-2}.conv.\2.gn.\3",
        ),
        (r"semantic_head\.logits\.(\w+)", r"semantic_head.conv_logits.\1"),
    ),
    block=r"backbone\.layer(\d)\.(\d+)\.",
    first_stage=1,
    branches={"instance": ("rpn_head.", "roi_head."), "semantic": ("semantic_head.",)},
    # Counters, and what the EMA hook of mmcv 1 swaps with the averages: those have the names of the network's tensors.
    ignored=r"\.num_batches_tracked$|^ema_",
)

SETTINGS: dict[str, Any] = {
    "stride_in_1x1": False,
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "resize": "mmdetection",
    "rpn_ranking": "probability",
    "clamp_shrinking": True,
    "fusion_rule": "mmdetection",
    "instance_score_threshold": 0.0,
}
"""Settings of all networks of mmdetection."""

PANOPTIC_SETTINGS: dict[str, Any] = {"score_threshold": 0.6, "class_agnostic_nms": True}
"""Settings in which mmdetection's panoptic configurations differ from its Mask R-CNN."""

_PREDICTOR = ("semantic_head.conv_logits.weight", "semantic_head.conv_logits.bias")


def is_mmdetection(weights: Collection[str]) -> bool:
    """Returns whether the tensor names are those of an mmdetection network with an FPN."""
    return "neck.lateral_convs.0.conv.weight" in weights


def settings(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Derives the settings of a network from its tensors, and adds those that mmdetection uses for all networks.

    Args:
        weights: Tensors or arrays by mmdetection's names.

    Returns:
        Fields of `PanopticFPNConfig`.

    Raises:
        CheckpointError: If the depth of the backbone is not that of a known ResNet.
    """
    found = {**LAYOUT.settings(weights), **SETTINGS}
    return {**found, **PANOPTIC_SETTINGS} if "semantic" in found["tasks"] else found


def categories(content: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the class names that mmdetection's training writes into a checkpoint.

    Args:
        content: The checkpoint.
        found: The settings that `settings` derives from its tensors.

    Returns:
        The field `categories` of `PanopticFPNConfig`: the built-in set with these names, or else classes with these
        names and ids from 1. A network with one branch (a Mask R-CNN) has only the names of that branch. Empty if the
        number of names differs from the number of classes of the network.
    """
    meta = content.get("meta")
    meta = meta.get("dataset_meta", meta) if isinstance(meta, Mapping) else None
    if not isinstance(meta, Mapping):
        return {}
    names = meta.get("classes", meta.get("CLASSES"))  # in mmdetection 3 and in mmdetection 2
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        return {}
    things, stuff = found.get("num_things", 0), found.get("num_stuff", 0)
    for known in (get_categories("coco_panoptic"), get_categories("cityscapes")):
        fits = things in (0, len(known.things)) and stuff in (0, len(known.stuff))
        if fits and list(names) in [[c.name for c in group] for group in (known.all, known.things)]:
            return {"categories": known}
    if not names or len(names) != things + stuff:
        return {}
    numbered = numbered_categories(things, stuff).all
    rows = [category._replace(name=name) for category, name in zip(numbered, names, strict=True)]
    return {"categories": Categories("mmdetection", tuple(rows[:things]), tuple(rows[things:]))}


def fill(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Replaces the tensors of a network by those of a checkpoint; see `Layout.fill`."""
    LAYOUT.fill(model, things_first(weights))


def things_first(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the channel of all things, the last one of mmdetection's semantic head, to the front, as in ours."""
    present = [name for name in _PREDICTOR if np.ndim(weights.get(name, 0)) > 0]
    return {**weights, **{name: float32(weights[name], name).roll(1, 0) for name in present}}


def tensors(model: PanopticFPN) -> dict[str, Tensor]:
    """Returns the tensors of a network by mmdetection's names; see `Layout.tensors`."""
    found = LAYOUT.tensors(model)
    found.update({name: found[name].roll(-1, 0) for name in _PREDICTOR if name in found})
    # mmdetection's batch norms have counters of batches, which its networks do not use.
    counted = [name for name in found if re.search(r"^backbone.*\.running_mean$", name)]
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0, device="cpu") for name in counted
    }
    return {**found, **counters}
