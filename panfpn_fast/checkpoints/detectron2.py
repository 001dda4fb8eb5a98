"""detectron2's Panoptic FPN checkpoints: how to know one, what network it is for, which tensor goes where."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from panfpn_fast.checkpoints.reader import CheckpointError
from panfpn_fast.models.config import BACKBONES, TASKS
from panfpn_fast.models.panoptic_fpn import PanopticFPN

_STEM = "backbone.bottom_up.stem.conv1.weight"

# Our name, as a pattern, and detectron2's. ResNet's stages are res2..res5 there and layer1..4 here.
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.conv1\.(\w+)", r"backbone.bottom_up.stem.conv1.\1"),
    (r"backbone\.norm1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (r"backbone\.layer(\d)\.(\d+)\.conv(\d)\.(\w+)", r"backbone.bottom_up.res{next}.\2.conv\3.\4"),
    (r"backbone\.layer(\d)\.(\d+)\.norm(\d)\.(\w+)", r"backbone.bottom_up.res{next}.\2.conv\3.norm.\4"),
    (r"backbone\.layer(\d)\.(\d+)\.shortcut\.conv\.(\w+)", r"backbone.bottom_up.res{next}.\2.shortcut.\3"),
    (
        r"backbone\.layer(\d)\.(\d+)\.shortcut\.norm\.(\w+)",
        r"backbone.bottom_up.res{next}.\2.shortcut.norm.\3",
    ),
    (r"fpn\.(lateral|output)\.p(\d)\.(\w+)", r"backbone.fpn_\1\2.\3"),
    (r"rpn\.conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn\.objectness\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn\.deltas\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"box_head\.(fc\d)\.(\w+)", r"roi_heads.box_head.\1.\2"),
    (r"box_head\.class_logits\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"box_head\.box_deltas\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"mask_head\.convs\.(\d+)\.(\w+)", r"roi_heads.mask_head.mask_fcn{next}.\2"),
    (r"mask_head\.deconv\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    (r"mask_head\.logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
    (r"semantic_head\.levels\.(p\d)\.(\d+)\.conv\.(\w+)", r"sem_seg_head.\1.{double}.\3"),
    (r"semantic_head\.levels\.(p\d)\.(\d+)\.norm\.(\w+)", r"sem_seg_head.\1.{double}.norm.\3"),
    (r"semantic_head\.logits\.(\w+)", r"sem_seg_head.predictor.\1"),
)

# Where the tensors of each branch are.
_BRANCHES = {"instance": ("proposal_generator.", "roi_heads."), "semantic": ("sem_seg_head.",)}

# Not weights: counters, and what old versions stored although the settings determine it.
_IGNORED = re.compile(r"\.num_batches_tracked$|^pixel_(mean|std)$|^proposal_generator\.anchor_generator\.")


def key(name: str) -> str:
    """Returns detectron2's name of one of our tensors.

    Args:
        name: a key of ``PanopticFPN.state_dict()``, for example ``"fpn.lateral.p2.weight"``.

    Returns:
        Its name there: ``"backbone.fpn_lateral2.weight"``.

    Raises:
        KeyError: detectron2's network has no such tensor.
    """
    for pattern, template in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            result = match.expand(template)
            if "{next}" in result:  # stages and mask convolutions count from one more there
                result = result.replace("{next}", str(int(match[1]) + 1))
            if "{double}" in result:  # there an upsampling sits between two convolutions and takes a number
                result = result.replace("{double}", str(2 * int(match[2])))
            return result
    raise KeyError(name)


def is_detectron2(weights: Collection[str]) -> bool:
    """Returns whether these tensor names are those of a detectron2 FPN network."""
    names = set(weights)
    return _STEM in names or "backbone.fpn_lateral2.weight" in names


def settings(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Reads off the tensors what network they belong to.

    Where the stride of a bottleneck is cannot be seen; detectron2's published COCO models have it in the 1x1
    convolution, the default.

    Args:
        weights: tensors or arrays by detectron2's names.

    Returns:
        Fields of ``PanopticFPNConfig``, as far as the tensors tell.

    Raises:
        CheckpointError: the backbone has a depth that no known ResNet has.
    """
    found: dict[str, Any] = {"backbone": _backbone(weights), "tasks": _tasks(weights)}
    for field, name, axis, extra in (
        ("num_things", "roi_heads.box_predictor.cls_score.weight", 0, 1),
        ("num_stuff", "sem_seg_head.predictor.weight", 0, 1),
        ("semantic_channels", "sem_seg_head.predictor.weight", 1, 0),
        ("fpn_channels", "backbone.fpn_lateral2.weight", 0, 0),
        ("box_head_channels", "roi_heads.box_head.fc1.weight", 0, 0),
        ("mask_head_channels", "roi_heads.mask_head.mask_fcn1.weight", 0, 0),
    ):
        shape = np.shape(weights[name]) if name in weights else ()
        if len(shape) > axis and shape[axis] > extra:
            found[field] = int(shape[axis]) - extra
    for field, name, rows in (
        ("class_agnostic_boxes", "roi_heads.box_predictor.bbox_pred.weight", 4),
        ("class_agnostic_masks", "roi_heads.mask_head.predictor.weight", 1),
    ):
        # Of a single class, both are the same.
        if name in weights and found.get("num_things", 1) > 1:
            found[field] = np.shape(weights[name])[:1] == (rows,)
    if (found.get("num_things"), found.get("num_stuff")) == (8, 11):
        found["dataset"] = "cityscapes"
    for field in ("pixel_mean", "pixel_std"):
        if field in weights:
            found[field] = tuple(float(v) for v in _float32(weights[field], field).flatten())
    return found


def _tasks(weights: Collection[str]) -> tuple[str, ...]:
    """The branches that the tensors belong to; both where they belong to neither, which is told later."""
    found = tuple(task for task in TASKS if any(name.startswith(_BRANCHES[task]) for name in weights))
    return found or TASKS


def _backbone(weights: Mapping[str, Any]) -> str:
    blocks: dict[int, set[int]] = {2: set(), 3: set(), 4: set(), 5: set()}
    for name in weights:
        match = re.match(r"backbone\.bottom_up\.res([2-5])\.(\d+)\.", name)
        if match:
            blocks[int(match[1])].add(int(match[2]))
    depth = tuple(len(found) for found in blocks.values())
    bottleneck = any(re.match(r"backbone\.bottom_up\.res2\.0\.conv3\.", name) for name in weights)
    published = {name: layout for name, layout in BACKBONES.items() if layout.width == 64}
    # A convolution's weight has as many columns as one of its groups has channels.
    columns = np.shape(weights.get("backbone.bottom_up.res2.0.conv2.weight", ()))[1:2]
    for name, layout in published.items():
        fits = (depth, bottleneck) == (layout.blocks, layout.bottleneck)
        if fits and (not bottleneck or columns in ((), (layout.group_width,))):
            return name
    raise CheckpointError(
        f"a backbone of {depth} {'bottlenecks' if bottleneck else 'basic blocks'} per stage; known are "
        + ", ".join(f"{name} {layout.blocks}" for name, layout in published.items())
    )


def fill(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Puts a checkpoint's tensors into a network, replacing its own.

    Args:
        model: a network; it may be on the meta device, and lack a branch.
        weights: tensors or arrays by detectron2's names.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape; the message lists them all.
    """
    own = model.state_dict()
    names, foreign = {}, []
    for name in own:
        try:
            names[key(name)] = name
        except KeyError:
            foreign.append(name)
    absent = tuple(prefix for task in TASKS if task not in model.config.tasks for prefix in _BRANCHES[task])
    unexpected = [
        name
        for name in weights
        if name not in names and not _IGNORED.search(name) and not name.startswith(absent)
    ]
    problems = [
        f"missing: {name} {list(own[name].shape)}, of which detectron2 has no like" for name in foreign
    ]
    problems += [
        f"missing: {theirs} {list(own[ours].shape)}"
        for theirs, ours in names.items()
        if theirs not in weights
    ]
    problems += [f"unexpected: {name} {list(np.shape(weights[name]))}" for name in unexpected]
    for theirs, ours in names.items():
        if theirs in weights and tuple(np.shape(weights[theirs])) != tuple(own[ours].shape):
            problems.append(
                f"wrong shape: {theirs} is {list(np.shape(weights[theirs]))}, "
                f"this network needs {list(own[ours].shape)}"
            )
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors do not fit a {model.config.backbone} network with "
            f"{model.config.num_things} thing and {model.config.num_stuff} stuff classes:\n  "
            + "\n  ".join(problems)
        )
    if "instance" in model.config.tasks:
        _check_anchors(model, weights)
    model.load_state_dict(
        {ours: _float32(weights[theirs], theirs) for theirs, ours in names.items()}, assign=True
    )


def _check_anchors(model: PanopticFPN, weights: Mapping[str, Any]) -> None:
    """Old checkpoints carry their anchors; other ones than ours would give wrong boxes without any error."""
    for level, ours in enumerate(model.rpn.cells.cpu()):
        name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
        if name not in weights:
            continue
        theirs = _float32(weights[name], name)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-2):
            raise CheckpointError(
                f"{name} is {theirs.tolist()}, but anchor_sizes and anchor_ratios give {ours.tolist()}"
            )


def _float32(value: object, name: str) -> Tensor:
    """Returns a contiguous float32 copy, which nothing else holds."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32, copy=True).contiguous()
    kind = getattr(value, "dtype", type(value).__name__)
    raise CheckpointError(f"{name}: expected a floating-point tensor, got {kind}")
