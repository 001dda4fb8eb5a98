"""The Panoptic FPN of an installed detectron2, with the weights of `stand_in`.

It is the unchanged model of a configuration in detectron2's model zoo, with detectron2's own post-processing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.checkpoints import detectron2 as layout
from panfpn_fast.data.sample import IGNORE, Target

from ..harness import peers
from ..harness.agreement import PanopticMap
from ..harness.stages import Part
from .stand_in import stand_in

NAME = "detectron2 0.6"

_CONFIGS = {
    f"resnet{depth}": f"COCO-PanopticSegmentation/panoptic_fpn_R_{depth}_3x.yaml" for depth in (50, 101)
}

# Our name of each loss, and detectron2's.
_LOSSES = {
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_box": "loss_rpn_loc",
    "loss_cls": "loss_cls",
    "loss_box": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_semantic": "loss_sem_seg",
}


@cache
def problem(device: torch.device) -> str | None:
    """Returns why detectron2 cannot be timed on a device, or None if it can."""
    if importlib.util.find_spec("detectron2") is None:
        return "detectron2 is not installed"
    try:
        importlib.import_module("detectron2.modeling")
    except ImportError as error:
        return f"detectron2 cannot be imported: {error}"
    return peers.torchvision_problem(device)


def _model_zoo() -> Path:
    """Returns the directory of the configurations in the installed package."""
    [package] = importlib.import_module("detectron2").__path__
    return Path(package) / "model_zoo" / "configs"


@cache
def network(backbone: str, device: torch.device, *, training: bool = False) -> Any:
    """Returns detectron2's model in float32.

    Args:
        backbone: Name of the ResNet.
        device: Device of the model.
        training: Whether the model is in training mode. All of its weights learn; detectron2's default freezes the
            first two stages of the backbone.
    """
    # `model_zoo.get_config` does the same, but needs pkg_resources, which setuptools no longer has.
    config = importlib.import_module("detectron2.config").get_cfg()
    config.merge_from_file(str(_model_zoo() / _CONFIGS[backbone]))
    config.MODEL.DEVICE = str(device)
    config.MODEL.BACKBONE.FREEZE_AT = 0
    found = importlib.import_module("detectron2.modeling").build_model(config)
    found.load_state_dict(layout.tensors(stand_in(backbone, device)))
    return found.train(training)


def _bgr(image: Tensor) -> Tensor:
    return image.flip(0)


@torch.no_grad()
def predict(backbone: str, device: torch.device, images: Sequence[Tensor]) -> list[PanopticMap]:
    """Predicts RGB images [3, H, W] at their own size and copies the panoptic maps to the host."""
    outputs = network(backbone, device)([{"image": _bgr(image)} for image in images])
    return [copy_to_host(*output["panoptic_seg"]) for output in outputs]


def copy_to_host(panoptic: Tensor, segments: Sequence[dict[str, Any]]) -> PanopticMap:
    isthing = torch.tensor([segment["isthing"] for segment in segments], dtype=torch.bool)
    label = torch.tensor([segment["category_id"] for segment in segments], dtype=torch.int64)
    return PanopticMap(panoptic.cpu(), isthing, label)


def parts_of(backbone: str, device: torch.device) -> list[Part]:
    """Returns the functions of a prediction; the stages are those of `harness.stages.parts_of`."""
    found = network(backbone, device)
    functions = importlib.import_module("detectron2.modeling.meta_arch.panoptic_fpn")
    return [
        Part(found, "preprocess_image", "prepare"),
        Part(found.backbone.bottom_up, "forward", "backbone"),
        Part(found.backbone, "forward", "fpn"),
        Part(found.proposal_generator, "forward", "rpn"),
        Part(found.roi_heads, "_forward_box", "box"),
        Part(found.roi_heads, "forward_with_given_boxes", "mask"),
        Part(found.sem_seg_head, "forward", "semantic"),
        Part(functions, "sem_seg_postprocess", "semantic"),
        Part(functions, "detector_postprocess", "merge"),
        Part(functions, "combine_semantic_and_instance_outputs", "merge"),
        Part(sys.modules[__name__], "copy_to_host", "copy"),
    ]


def _annotated(image: Tensor, target: Target) -> dict[str, Any]:
    """Converts an image and its target to what detectron2's mapper makes for training."""
    structures = importlib.import_module("detectron2.structures")
    numbers = torch.arange(1, len(target.boxes) + 1, device=image.device, dtype=target.instances.dtype)
    instances = structures.Instances(
        tuple(image.shape[1:]),
        gt_boxes=structures.Boxes(target.boxes),
        gt_classes=target.classes,
        gt_masks=structures.BitMasks(target.instances == numbers[:, None, None]),
    )
    semantic = torch.where(target.semantic == IGNORE, 255, target.semantic).long()
    return {"image": _bgr(image), "instances": instances, "sem_seg": semantic}


def losses(backbone: str, image: Tensor, target: Target) -> dict[str, Tensor]:
    """Returns the weighted losses of one image, by our names; each call samples the same anchors and boxes."""
    events = importlib.import_module("detectron2.utils.events")
    torch.manual_seed(0)
    with events.EventStorage():
        found = network(backbone, image.device, training=True)([_annotated(image, target)])
    return {ours: found[theirs] for ours, theirs in _LOSSES.items()}


def weights(backbone: str, device: torch.device) -> list[list[Tensor]]:
    """Returns the weights that learn of each part of our network, in the order of ours."""
    by_name = dict(network(backbone, device, training=True).named_parameters())
    return [
        [by_name[layout.key(f"{part}.{name}")] for name, _ in module.named_parameters()]
        for part, module in stand_in(backbone, device).named_children()
    ]
