"""mmdetection's Panoptic FPN checkpoints: how to know one, how its network runs, which tensor goes where.

The semantics are those of mmdetection 3.3.0, ``configs/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints.layout import Layout, float32
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
    ignored=r"\.num_batches_tracked$",
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
"""How mmdetection runs its networks."""

PANOPTIC_SETTINGS: dict[str, Any] = {"score_threshold": 0.6, "class_agnostic_nms": True}
"""What its panoptic configurations have otherwise than its Mask R-CNN."""

_PREDICTOR = ("semantic_head.conv_logits.weight", "semantic_head.conv_logits.bias")


def is_mmdetection(weights: Collection[str]) -> bool:
    """Returns whether these tensor names are those of an mmdetection FPN network."""
    return "neck.lateral_convs.0.conv.weight" in weights


def settings(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Reads off the tensors what network they belong to, and adds how mmdetection runs it.

    Args:
        weights: tensors or arrays by mmdetection's names.

    Returns:
        Fields of ``PanopticFPNConfig``.

    Raises:
        CheckpointError: the backbone has a depth that no known ResNet has.
    """
    found = {**LAYOUT.settings(weights), **SETTINGS}
    return {**found, **PANOPTIC_SETTINGS} if "semantic" in found["tasks"] else found


def fill(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Puts a checkpoint's tensors into a network, replacing its own; see :meth:`Layout.fill`."""
    LAYOUT.fill(model, things_first(weights))


def things_first(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the semantic head's last channel, which has the things, to the front, where ours has them."""
    present = [name for name in _PREDICTOR if np.ndim(weights.get(name, 0)) > 0]
    return {**weights, **{name: float32(weights[name], name).roll(1, 0) for name in present}}


def tensors(model: PanopticFPN) -> dict[str, Tensor]:
    """Returns a network's tensors by mmdetection's names; see :meth:`Layout.tensors`."""
    found = LAYOUT.tensors(model)
    found.update({name: found[name].roll(-1, 0) for name in _PREDICTOR if name in found})
    # Its batch norms count their batches; nothing uses that number.
    counted = [name for name in found if re.search(r"^backbone.*\.running_mean$", name)]
    counters = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in counted}
    return {**found, **counters}
