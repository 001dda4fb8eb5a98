"""The network's settings: one frozen dataclass, checked when it is made, and the presets by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from panfpn_fast.inference.preprocess import RESIZES


class ResNetLayout(NamedTuple):
    """What tells one ResNet from another.

    Attributes:
        blocks: per stage.
        bottleneck: blocks of three convolutions, else of two.
        width: channels behind the stem; each stage has twice those of the one before.
        groups: of a bottleneck's 3x3 convolution; above 1 it is a ResNeXt (Xie et al. 2017).
        group_width: channels of each of them in the first stage; a bottleneck without groups has 64.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    width: int = 64
    groups: int = 1
    group_width: int = 64


BACKBONES: dict[str, ResNetLayout] = {
    "resnet50": ResNetLayout((3, 4, 6, 3)),
    "resnet101": ResNetLayout((3, 4, 23, 3)),
    "resnet152": ResNetLayout((3, 8, 36, 3)),
    "resnet18": ResNetLayout((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetLayout((3, 4, 6, 3), bottleneck=False),
    "resnext50_32x4d": ResNetLayout((3, 4, 6, 3), groups=32, group_width=4),
    "resnext101_32x8d": ResNetLayout((3, 4, 23, 3), groups=32, group_width=8),
    "resnet10_narrow": ResNetLayout((1, 1, 1, 1), bottleneck=False, width=32),
}
"""ResNets by name (He et al. 2016, table 1), ResNeXts, and a small one for CPUs."""

LIBRARIES = ("torchvision", "timm")
"""Whose networks a backbone can be made of."""

NORMS = ("frozen_bn", "bn", "sync_bn", "gn")
"""Normalisations of the backbone."""

FusionRule = Literal["detectron2", "mmdetection", "panopticapi"]

RPN_RANKINGS = ("logit", "probability")
"""What orders proposals."""

TASKS = ("instance", "semantic")
"""What a network may do: find instances of things, and label pixels with stuff."""

FPN_STRIDES = (4, 8, 16, 32, 64)
"""Strides of P2..P6."""


def _full_name(backbone: object) -> str:
    """A backbone's name, with the library that it is of unless it is ours."""
    if isinstance(backbone, str):
        library, colon, network = backbone.partition(":")
        if backbone in BACKBONES or (library in LIBRARIES and colon and network):
            return backbone
        if backbone.isidentifier():
            return f"torchvision:{backbone}"
    raise ValueError(
        f"backbone: expected one of {', '.join(BACKBONES)}, a network's name of torchvision, 'torchvision:NAME' or "
        f"'timm:NAME', got {backbone!r}"
    )


@dataclasses.dataclass(frozen=True)
class PanopticFPNConfig:
    """Everything that decides what a :class:`PanopticFPN` is and how it predicts.

    The defaults are detectron2's ``COCO-PanopticSegmentation/panoptic_fpn_R_50_3x``.

    Attributes:
        tasks: the branches that exist: both, or ``("instance",)`` (Mask R-CNN) or ``("semantic",)`` alone, the two
            separate networks that the paper compares with.
        backbone: a key of :data:`BACKBONES`, such as ``"resnet50"``; or a network of torchvision or timm, if that is
            installed: ``"torchvision:mobilenet_v3_large"``, ``"timm:convnext_tiny"``. Any other plain name is one of
            torchvision's, and becomes ``"torchvision:NAME"``.
        backbone_norm: its normalisation: ``"frozen_bn"`` (a checkpoint's statistics and scale, never trained),
            ``"bn"``, ``"sync_bn"`` (over all processes) or ``"gn"`` (at most 32 groups of at least 8 channels). Of
            torchvision's and timm's networks, the batch norms are replaced so; other normalisations stay.
        stride_in_1x1: where a bottleneck that halves the resolution has its stride: in the first 1x1
            convolution (True; Caffe, MSRA, detectron2's COCO models) or in the 3x3 one (False; torchvision,
            mmdetection). The weights do not show it, and the wrong choice ruins the result.
        num_things: thing classes (with instances).
        num_stuff: stuff classes; the semantic head has one more channel, channel 0, for all things.
        dataset: whose class names and colours the predictions carry (``panfpn_fast.data.get_categories``).
        pixel_mean: subtracted from 0..255 values, in ``channel_order``.
        pixel_std: then divided by, in ``channel_order``.
        channel_order: the order in which the backbone wants colours: ``"BGR"`` or ``"RGB"``.
        resize: whose way of resizing photographs the network was trained with, ``"detectron2"`` (Pillow) or
            ``"mmdetection"`` (OpenCV); a `Predictor` goes by it.
        size_divisibility: images are zero-padded right and bottom to a multiple of this; a multiple of 32.
        fpn_channels: channels of P2..P6.
        fpn_groups: 1: both branches see all of these; 2: the instance branch has one half and the semantic branch the
            other, which nothing connects above the backbone (the paper's ablation).
        anchor_sizes: side of the square anchor, in pixels of the input, at each of P2..P6.
        anchor_ratios: anchors' height / width.
        rpn_ranking: what anchors are ordered by: ``"logit"``, or ``"probability"`` as mmdetection does, with which
            large logits are closer together, or equal, in float32.
        rpn_pre_nms_topk: best anchors per level that enter NMS.
        rpn_post_nms_topk: proposals per image that leave it, over all levels.
        rpn_nms_threshold: IoU above which, within a level, the lower scored proposal is dropped.
        box_pool_size: ROIAlign's output side for the box head.
        box_head_channels: width of the box head's two linear layers.
        box_weights: scale of the box head's (dx, dy, dw, dh).
        class_agnostic_boxes: proposals are refined in the same way whatever their class.
        clamp_shrinking: dw and dh are cut off at -log(1000 / 16), too, for proposals and boxes, as mmdetection does;
            at log(1000 / 16) they always are.
        score_threshold: a class of a proposal is a candidate if its probability is above this.
        nms_threshold: IoU above which, within a class, the lower scored box is dropped.
        class_agnostic_nms: the same among boxes of all classes, as in mmdetection's panoptic networks.
        detections_per_image: best detections per image that are kept.
        mask_pool_size: ROIAlign's output side for the mask head; masks have twice this side.
        mask_head_channels: channels of the mask head's convolutions.
        mask_head_convs: their number.
        class_agnostic_masks: one mask per box, whatever its class, instead of one for each class.
        semantic_channels: channels of the semantic head (64, 128 or 256 in the paper).
        semantic_groups: groups of its GroupNorm.
        semantic_fusion: how it combines the levels: ``"sum"``, or ``"concat"``, then with one predictor over four
            times the channels.
        mask_threshold: a pixel belongs to an instance if its mask probability is at least this.
        fusion_rule: whose rules decide the corners of merging, see :func:`panfpn_fast.ops.panoptic_merge`:
            ``"detectron2"``, ``"mmdetection"`` or ``"panopticapi"``.
        instance_score_threshold: instances scored below this do not enter the panoptic map.
        overlap_threshold: an instance of whose mask more than this share is already taken is dropped.
        stuff_area_threshold: stuff segments with fewer pixels than this are dropped.

    Raises:
        ValueError: a field has a value it cannot take; the message names the field.
    """

    tasks: tuple[str, ...] = TASKS
    backbone: str = "resnet50"
    backbone_norm: str = "frozen_bn"
    stride_in_1x1: bool = True
    num_things: int = 80
    num_stuff: int = 53
    dataset: str = "coco_panoptic"
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: str = "BGR"
    resize: str = "detectron2"
    size_divisibility: int = 32
    fpn_channels: int = 256
    fpn_groups: int = 1
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_ranking: str = "logit"
    rpn_pre_nms_topk: int = 1000
    rpn_post_nms_topk: int = 1000
    rpn_nms_threshold: float = 0.7
    box_pool_size: int = 7
    box_head_channels: int = 1024
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    class_agnostic_boxes: bool = False
    clamp_shrinking: bool = False
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    class_agnostic_nms: bool = False
    detections_per_image: int = 100
    mask_pool_size: int = 14
    mask_head_channels: int = 256
    mask_head_convs: int = 4
    class_agnostic_masks: bool = False
    semantic_channels: int = 128
    semantic_groups: int = 32
    semantic_fusion: str = "sum"
    mask_threshold: float = 0.5
    fusion_rule: FusionRule = "detectron2"
    instance_score_threshold: float = 0.5
    overlap_threshold: float = 0.5
    stuff_area_threshold: int = 4096

    def __post_init__(self) -> None:
        for name in (
            "num_things",
            "num_stuff",
            "size_divisibility",
            "fpn_channels",
            "rpn_pre_nms_topk",
            "rpn_post_nms_topk",
            "box_pool_size",
            "box_head_channels",
            "detections_per_image",
            "mask_pool_size",
            "mask_head_channels",
            "mask_head_convs",
            "semantic_channels",
            "semantic_groups",
        ):
            self._check_int(name, least=1)
        self._check_int("stuff_area_threshold", least=0)
        for name in (
            "rpn_nms_threshold",
            "score_threshold",
            "nms_threshold",
            "mask_threshold",
            "instance_score_threshold",
            "overlap_threshold",
        ):
            value = self._check_number(name, getattr(self, name))
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        self._check_numbers("pixel_mean", length=3, positive=False)
        self._check_numbers("pixel_std", length=3, positive=True)
        self._check_numbers("anchor_sizes", length=len(FPN_STRIDES), positive=True)
        self._check_numbers("anchor_ratios", length=None, positive=True)
        self._check_numbers("box_weights", length=4, positive=True)
        # As for the numbers above, a list becomes a tuple.
        if not isinstance(self.tasks, list | tuple) or tuple(self.tasks) not in (TASKS, TASKS[:1], TASKS[1:]):
            raise ValueError(f"tasks: expected {TASKS}, {TASKS[:1]} or {TASKS[1:]}, got {self.tasks!r}")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "backbone", _full_name(self.backbone))
        if self.fpn_groups not in (1, 2) or self.fpn_channels % self.fpn_groups:
            raise ValueError(
                f"fpn_groups: expected 1, or 2 with an even fpn_channels, got {self.fpn_groups!r}"
            )
        choices: dict[str, tuple[str, ...]] = {
            "backbone_norm": NORMS,
            "resize": RESIZES,
            "rpn_ranking": RPN_RANKINGS,
            "fusion_rule": get_args(FusionRule),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in (
            "stride_in_1x1",
            "class_agnostic_boxes",
            "clamp_shrinking",
            "class_agnostic_nms",
            "class_agnostic_masks",
        ):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.channel_order not in ("BGR", "RGB"):
            raise ValueError(f"channel_order: expected 'BGR' or 'RGB', got {self.channel_order!r}")
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"dataset: expected a data set's name, got {self.dataset!r}")
        if self.num_stuff > 4095:
            raise ValueError(f"num_stuff: panoptic_merge takes labels below 4096, got {self.num_stuff}")
        if self.size_divisibility % 32:
            raise ValueError(f"size_divisibility: expected a multiple of 32, got {self.size_divisibility}")
        if self.semantic_channels % self.semantic_groups:
            raise ValueError(
                f"semantic_channels: expected a multiple of semantic_groups ({self.semantic_groups}), "
                f"got {self.semantic_channels}"
            )
        if self.semantic_fusion not in ("sum", "concat"):
            raise ValueError(f"semantic_fusion: expected 'sum' or 'concat', got {self.semantic_fusion!r}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")

    @staticmethod
    def _check_number(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
        return float(value)

    def _check_numbers(self, name: str, length: int | None, positive: bool) -> None:
        value = getattr(self, name)
        wanted = f"{length} numbers" if length else "one number or more"
        if not isinstance(value, list | tuple) or not value or (length and len(value) != length):
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")
        numbers = tuple(self._check_number(name, v) for v in value)
        if positive and min(numbers) <= 0:
            raise ValueError(f"{name}: expected numbers above 0, got {value!r}")
        # A list (from JSON or a command line) becomes a tuple, so that equal settings compare and hash equal.
        object.__setattr__(self, name, numbers)

    @property
    def branch_channels(self) -> int:
        """Channels of P2..P6 as each branch sees them."""
        return self.fpn_channels // self.fpn_groups

    def replace(self, **overrides: Any) -> PanopticFPNConfig:
        """Returns a copy with some fields changed.

        Args:
            **overrides: fields of this class and their new values.

        Returns:
            A new, checked configuration.

        Raises:
            TypeError: a name that is no field.
            ValueError: a value the field cannot take.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(
                f"unknown setting {', '.join(unknown)}; PanopticFPNConfig has {', '.join(sorted(known))}"
            )
        return dataclasses.replace(self, **overrides)


_CITYSCAPES: dict[str, Any] = {"num_things": 8, "num_stuff": 11, "dataset": "cityscapes"}

# torchvision's weights, which it can begin with, were trained so.
_MOBILENET: dict[str, Any] = {
    "backbone": "torchvision:mobilenet_v3_large",
    "channel_order": "RGB",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}

presets: dict[str, PanopticFPNConfig] = {
    "panoptic_fpn_r50": PanopticFPNConfig(),
    "panoptic_fpn_r101": PanopticFPNConfig(backbone="resnet101"),
    "panoptic_fpn_mobilenet": PanopticFPNConfig(**_MOBILENET),
    "panoptic_fpn_r50_cityscapes": PanopticFPNConfig(**_CITYSCAPES),
    "panoptic_fpn_r101_cityscapes": PanopticFPNConfig(backbone="resnet101", **_CITYSCAPES),
    "panoptic_fpn_mobilenet_cityscapes": PanopticFPNConfig(**_MOBILENET, **_CITYSCAPES),
}


def get_preset(name: str) -> PanopticFPNConfig:
    """Returns the configuration of a preset.

    Args:
        name: a key of :data:`presets`, for example ``"panoptic_fpn_r50"``.

    Returns:
        The configuration.

    Raises:
        ValueError: no preset has that name; the message lists those there are.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(presets)}")
    return presets[name]
