"""Reads and writes the tensors of detectron2's Panoptic FPN checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.checkpoints.layout import Layout, float32
from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.models.panoptic_fpn import PanopticFPN

LAYOUT = Layout(
    framework="detectron2",
    rules=(
        (r"backbone\.conv1\.(\w+)", r"backbone.bottom_up.stem.conv1.\1"),
        (r"backbone\.norm1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
        # ResNet's stages are res2..res5 there and layer1..4 here.
        (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(\w+)", r"backbone.bottom_up.res{1+1}.\2.conv\3.\4"),
        (r"backbone\.layer(\d)\.(\d+)\.norm(\d)\.(\w+)", r"backbone.bottom_up.res{1+1}.\2.conv\3.norm.\4"),
        (
            r"backbone\.layer(\d)\.(\d+)\.shortcut\.conv\.(\w+)",
            r"backbone.bottom_up.res{1+1}.\2.shortcut.\3",
        ),
        (
            r"backbone\.layer(\d)\.(\d+)\.shortcut\.norm\.(\w+)",
            r"backbone.bottom_up.res{1+1}.\2.shortcut.norm.\3",
        ),
        (r"fpn\.(lateral|output)\.p(\d)\.(\w+)", r"backbone.fpn_\1\2.\3"),
        (r"rpn\.conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
        (r"rpn\.objectness\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
        (r"rpn\.deltas\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
        (r"box_head\.(fc\d)\.(\w+)", r"roi_heads.box_head.\1.\2"),
        (r"box_head\.class_logits\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
        (r"box_head\.box_deltas\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
        (r"mask_head\.convs\.(\d+)\.(\w+)", r"roi_heads.mask_head.mask_fcn{1+1}.\2"),
        (r"mask_head\.deconv\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
        (r"mask_head\.logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
        # In detectron2 the upsampling between two convolutions has an index, too.
        (r"semantic_head\.levels\.(p\d)\.(\d+)\.conv\.(\w+)", r"sem_seg_head.\1.{2*2}.\3"),
        (r"semantic_head\.levels\.(p\d)\.(\d+)\.norm\.(\w+)", r"sem_seg_head.\1.{2*2}.norm.\3"),
        (r"semantic_head\.logits\.(\w+)", r"sem_seg_head.predictor.\1"),
    ),
    block=r"backbone\.bottom_up\.res(\d)\.(\d+)\.",
    first_stage=2,
    branches={"instance": ("proposal_generator.", "roi_heads."), "semantic": ("sem_seg_head.",)},
    # Counters, and tensors that the settings determine but old versions stored.
    ignored=r"\.num_batches_tracked$|^pixel_(mean|std)$|^proposal_generator\.anchor_generator\.",
)

key = LAYOUT.key
"""Converts our name of a tensor to detectron2's name; see `Layout.key`."""


def is_detectron2(weights: Collection[str]) -> bool:
    """Returns whether the tensor names are those of a detectron2 network with an FPN."""
    return bool({"backbone.bottom_up.stem.conv1.weight", "backbone.fpn_lateral2.weight"} & set(weights))


def settings(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Derives the settings of a network from its tensors; see `Layout.settings`.

    The tensors do not show which convolution of a bottleneck has the stride. In detectron2's published COCO models it
    is the first 1x1 convolution, which is the default here.
    """
    found = LAYOUT.settings(weights)
    for field in ("pixel_mean", "pixel_std"):
        if field in weights:
            found[field] = tuple(float(v) for v in float32(weights[field], field).flatten())
    return found


def fill(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Replaces the tensors of a network by those of a checkpoint; see `Layout.fill`."""
    LAYOUT.fill(model, weights)
    if "instance" in model.config.tasks:
        _check_anchors(model, weights)


def tensors(model: PanopticFPN) -> dict[str, Tensor]:
    """Returns the tensors of a network by detectron2's names; see `Layout.tensors`."""
    return LAYOUT.tensors(model)


def _check_anchors(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Compares the anchors in old checkpoints with ours; unequal anchors would give wrong boxes without an error."""
    for level, ours in enumerate(model.rpn.cells.cpu()):
        name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
        if name not in weights:
            continue
        theirs = float32(weights[name], name)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-2):
            raise CheckpointError(
                f"{name} is {theirs.tolist()}, but anchor_sizes and anchor_ratios give {ours.tolist()}; "
                "set these two fields to the values that the network was trained with"
            )
