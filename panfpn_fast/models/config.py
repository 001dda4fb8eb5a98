"""The settings of the network, as a frozen dataclass that checks its fields, and the presets by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from panfpn_fast._errors import similar
from panfpn_fast.data.categories import (
    MAX_STUFF,
    Categories,
    get_categories,
    numbered_categories,
    to_categories,
)
from panfpn_fast.data.images import RESIZES


class ResNetLayout(NamedTuple):
    """The parameters that distinguish one ResNet from another.

    Attributes:
        blocks: Number of blocks per stage.
        bottleneck: Whether blocks have three convolutions instead of two.
        width: Number of channels after the stem; each stage doubles it.
        groups: Number of groups of a bottleneck's 3x3 convolution; above 1 for a ResNeXt (Xie et al. 2017).
        group_width: Channels per group in the first stage; 64 for a bottleneck without groups.
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
"""ResNets by name (He et al. 2016, table 1), ResNeXts, and a small ResNet for CPUs."""

LIBRARIES = ("torchvision", "timm")
"""The libraries whose networks can be the backbone."""

NORMS = ("frozen_bn", "bn", "sync_bn", "gn")
"""The normalisations of the backbone."""

FusionRule = Literal["detectron2", "mmdetection", "panopticapi"]

RPN_RANKINGS = ("logit", "probability")
"""The quantities that proposals can be ranked by."""

TASKS = ("instance", "semantic")
"""The tasks of a network: detecting instances of things, and labelling pixels with stuff."""

FPN_STRIDES = (4, 8, 16, 32, 64)
"""The strides of P2 to P6."""

_DERIVED: Any = None
"""Default of fields whose values `__post_init__` derives from other fields."""


def _full_name(backbone: object) -> str:
    """Returns the name of a backbone, with the prefix of its library unless the backbone is ours."""
    if isinstance(backbone, str):
        library, colon, network = backbone.partition(":")
        if backbone in BACKBONES or (library in LIBRARIES and colon and network):
            return backbone
        if backbone.isidentifier():
            return f"torchvision:{backbone}"
    raise ValueError(
        f"backbone: expected one of {', '.join(BACKBONES)}, 'torchvision:NAME' or 'timm:NAME', got {backbone!r:.40}"
    )


@dataclasses.dataclass(frozen=True)
class PanopticFPNConfig:
    """The architecture of a `PanopticFPN` and the settings of its predictions.

    The defaults are detectron2's `COCO-PanopticSegmentation/panoptic_fpn_R_50_3x`.

    Attributes:
        tasks: The branches of the network: both, only `("instance",)` (Mask R-CNN), or only `("semantic",)`. The paper
            compares with two separate networks of one branch each. A network without things has no instance branch,
            and a network without stuff no semantic branch, so both become the one that has classes.
        backbone: A key of `BACKBONES`, such as `"resnet50"`, or a network of torchvision or timm, if the library is
            installed: `"torchvision:mobilenet_v3_large"`, `"timm:convnext_tiny"`. Any other plain name refers to
            torchvision and becomes `"torchvision:NAME"`.
        backbone_norm: Normalisation of the backbone: `"frozen_bn"` (a checkpoint's statistics and scale, never
            trained), `"bn"`, `"sync_bn"` (over all processes) or `"gn"` (at most 32 groups of at least 8 channels). In
            networks of torchvision and timm it replaces the batch norms; other normalisations stay.
        stride_in_1x1: Whether a bottleneck that halves the resolution has its stride in the first 1x1 convolution
            (Caffe, MSRA, detectron2's COCO models) instead of the 3x3 convolution (torchvision, mmdetection). The
            weights do not reveal the choice, and the wrong choice ruins the result.
        categories: Classes with their ids, names and colours: a `Categories` object, or a name for
            `panfpn_fast.data.get_categories`. By default COCO's classes if `num_things` and `num_stuff`
            are absent or equal to COCO's 80 and 53, and numbered classes ("thing 1", "stuff 1") otherwise.
        num_things: Number of thing classes, which have instances; by default the number in `categories`. May be 0 if
            there is stuff.
        num_stuff: Number of stuff classes, at most 4095; by default the number in `categories`. May be 0 if there are
            things. The semantic head has one more channel, channel 0, for all things.
        pixel_mean: Mean that is subtracted from values 0 to 255, in `channel_order`.
        pixel_std: Standard deviation that the difference is divided by, in `channel_order`.
        channel_order: Order of the colours in the backbone's input: `"BGR"` or `"RGB"`.
        resize: Method of resizing images with which the network was trained and with which a `Predictor` resizes:
            `"detectron2"` (Pillow) or `"mmdetection"` (OpenCV).
        short_edge: Length in pixels of the shorter edge of images that the network predicts. Training sets it to the
            edge of its evaluation. Predictions at another size can be much worse.
        max_edge: Upper limit for the longer edge of these images, in pixels.
        size_divisibility: Images are zero-padded on the right and bottom to a multiple of this multiple of 32.
        fpn_channels: Number of channels of P2 to P6.
        fpn_groups: With 1, both branches receive all FPN channels. With 2, each branch has its own FPN with half of
            the channels, and nothing above the backbone connects the two (the paper's ablation).
        anchor_sizes: Side of the square anchor at each of P2 to P6, in pixels of the input.
        anchor_ratios: Ratios height / width of the anchors.
        rpn_ranking: Quantity by which anchors are ranked: `"logit"`, or `"probability"` as in mmdetection, where large
            logits become nearly equal or equal in float32.
        rpn_pre_nms_topk: Number of best anchors per level that enter NMS.
        rpn_post_nms_topk: Largest number of proposals per image after NMS, over all levels.
        rpn_nms_threshold: IoU above which NMS suppresses the proposal with the lower score, within a level.
        box_pool_size: Side of ROIAlign's output for the box head.
        box_head_channels: Width of the two linear layers of the box head.
        box_weights: Scales of the box head's (dx, dy, dw, dh).
        class_agnostic_boxes: Whether one set of deltas refines a proposal for all classes.
        clamp_shrinking: Whether dw and dh of proposals and boxes have the lower limit -log(1000 / 16), as in
            mmdetection. They always have the upper limit log(1000 / 16).
        score_threshold: Probability above which a class of a proposal is a candidate.
        nms_threshold: IoU above which NMS suppresses the box with the lower score, within a class.
        class_agnostic_nms: Whether NMS compares boxes of all classes, as in mmdetection's panoptic networks.
        detections_per_image: Largest number of detections per image; the best ones are kept.
        mask_pool_size: Side of ROIAlign's output for the mask head; masks have twice this side.
        mask_head_channels: Number of channels of the mask head's convolutions.
        mask_head_convs: Number of convolutions of the mask head.
        class_agnostic_masks: Whether the mask head predicts one mask per box instead of one per box and class.
        semantic_channels: Number of channels of the semantic head (64, 128 or 256 in the paper).
        semantic_groups: Number of groups of the semantic head's GroupNorm.
        semantic_fusion: How the semantic head combines the levels: `"sum"`, or `"concat"` with one predictor over four
            times the channels.
        mask_threshold: Mask probability from which a pixel belongs to an instance.
        fusion_rule: Framework whose rules decide the corner cases of merging, see `panfpn_fast.ops.panoptic_merge`:
            `"detectron2"`, `"mmdetection"` or `"panopticapi"`.
        instance_score_threshold: Score from which an instance enters the panoptic map.
        overlap_threshold: Share of an instance's mask that may already be taken; above it the instance is dropped.
        stuff_area_threshold: Number of pixels from which a stuff segment is kept.

    Raises:
        ValueError: If a field has an invalid value; the message names the field.
    """

    tasks: tuple[str, ...] = TASKS
    backbone: str = "resnet50"
    backbone_norm: str = "frozen_bn"
    stride_in_1x1: bool = True
    categories: Categories = _DERIVED
    num_things: int = _DERIVED
    num_stuff: int = _DERIVED
    pixel_mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: str = "BGR"
    resize: str = "detectron2"
    short_edge: int = 800
    max_edge: int = 1333
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
        self._set_categories()
        for name in (
            "short_edge",
            "max_edge",
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
        self._set_tasks()
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
        if self.size_divisibility % 32:
            raise ValueError(f"size_divisibility: expected a multiple of 32, got {self.size_divisibility}")
        if self.semantic_channels % self.semantic_groups:
            raise ValueError(
                f"semantic_channels: expected a multiple of semantic_groups ({self.semantic_groups}), "
                f"got {self.semantic_channels}"
            )
        if self.semantic_fusion not in ("sum", "concat"):
            raise ValueError(f"semantic_fusion: expected 'sum' or 'concat', got {self.semantic_fusion!r}")

    def _set_categories(self) -> None:
        """Derives the classes from their counts or the counts from the classes; given both, compares them."""
        known = get_categories("coco_panoptic") if self.categories is None else to_categories(self.categories)
        counts = {"num_things": len(known.things), "num_stuff": len(known.stuff)}
        for name, count in counts.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, count)
            self._check_int(name, least=0)
        if self.num_stuff > MAX_STUFF:
            raise ValueError(
                f"num_stuff: expected at most {MAX_STUFF}, since panoptic_merge takes labels up to {MAX_STUFF}; "
                f"got {self.num_stuff}"
            )
        for name, count in counts.items():
            if getattr(self, name) == count:
                continue
            if self.categories is not None:
                raise ValueError(
                    f"{name}: expected {count}, as many as categories ({known.name!r}) has, got {getattr(self, name)}; "
                    "set one of the two"
                )
            known = numbered_categories(self.num_things, self.num_stuff)
            break
        if not known.all:
            names = "num_things, num_stuff" if self.categories is None else "categories"
            raise ValueError(f"{names}: expected at least one class, got none")
        object.__setattr__(self, "categories", known)

    def _set_tasks(self) -> None:
        """Checks the tasks, and leaves out the task of both that has no classes."""
        # A list becomes a tuple, as for the numbers.
        if not isinstance(self.tasks, list | tuple) or tuple(self.tasks) not in (TASKS, TASKS[:1], TASKS[1:]):
            raise ValueError(f"tasks: expected {TASKS}, {TASKS[:1]} or {TASKS[1:]}, got {self.tasks!r}")
        counts = {"instance": self.num_things, "semantic": self.num_stuff}
        tasks = tuple(task for task in self.tasks if counts[task])
        if not tasks:
            kind, other = ("things", "semantic") if "instance" in self.tasks else ("stuff", "instance")
            raise ValueError(
                f"tasks: expected {(other,)}, because categories ({self.categories.name!r}) has no {kind}, "
                f"got {tuple(self.tasks)}"
            )
        object.__setattr__(self, "tasks", tasks)

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
        wanted = f"{length} numbers" if length else "at least one number"
        if not isinstance(value, list | tuple) or not value or (length and len(value) != length):
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")
        numbers = tuple(self._check_number(name, v) for v in value)
        if positive and min(numbers) <= 0:
            raise ValueError(f"{name}: expected numbers above 0, got {value!r}")
        # A list (from JSON or a command line) becomes a tuple, so that equal settings compare equal and hash equally.
        object.__setattr__(self, name, numbers)

    @property
    def branch_channels(self) -> int:
        """Number of channels of P2 to P6 that each branch receives."""
        return self.fpn_channels // self.fpn_groups

    def replace(self, **overrides: Any) -> PanopticFPNConfig:
        """Returns a copy with some fields changed.

        New `categories` also change `num_things` and `num_stuff`. A new number of things or stuff without
        `categories` replaces the classes by numbered classes. A task that was left out for lack of classes stays out.

        Args:
            **overrides: Names of fields and their new values.

        Returns:
            A new, checked configuration.

        Raises:
            TypeError: If a name is not a field.
            ValueError: If a value is invalid for its field.
        """
        known = {f.name for f in dataclasses.fields(self)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(
                f"{unknown[0]}: unknown setting; PanopticFPNConfig has similar ones: {similar(unknown[0], known)}"
            )
        counts = ("num_things", "num_stuff")
        if "categories" in overrides:
            overrides = {**dict.fromkeys(counts), **overrides}
        elif any(name in overrides and overrides[name] != getattr(self, name) for name in counts):
            overrides["categories"] = None
        return dataclasses.replace(self, **overrides)


CITYSCAPES: dict[str, Any] = {"categories": "cityscapes", "short_edge": 1024, "max_edge": 2048}
"""Settings of networks for Cityscapes, whose images have 1024 x 2048 pixels."""

# The normalisation with which torchvision's pretrained weights were trained.
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
    "panoptic_fpn_r50_cityscapes": PanopticFPNConfig(**CITYSCAPES),
    "panoptic_fpn_r101_cityscapes": PanopticFPNConfig(backbone="resnet101", **CITYSCAPES),
    "panoptic_fpn_mobilenet_cityscapes": PanopticFPNConfig(**_MOBILENET, **CITYSCAPES),
}


def get_preset(name: str) -> PanopticFPNConfig:
    """Returns the configuration of a preset.

    Args:
        name: A key of `presets`, for example `"panoptic_fpn_r50"`.

    Returns:
        The configuration.

    Raises:
        ValueError: If no preset has this name; the message lists the known names.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r:.40}; known presets: {', '.join(presets)}")
    return presets[name]
