"""Panoptic FPN (Kirillov et al., CVPR 2019): one feature pyramid with an instance and a semantic branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.backbone import ResNet
from panfpn_fast.models.boxes import clip_boxes, nonempty, scale_boxes
from panfpn_fast.models.config import BACKBONES, PanopticFPNConfig, get_preset
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.fpn import FPN
from panfpn_fast.models.layers import ExactConstants, at_least_float32
from panfpn_fast.models.outputs import ImageBatch, InstanceOutput, PanopticOutput
from panfpn_fast.models.roi_heads import BoxHead, Detections, MaskHead
from panfpn_fast.models.rpn import RPN
from panfpn_fast.models.semantic_head import SemanticHead

Wanted = Literal["all", "panoptic"]
"""The instances to predict: all, or those that can get pixels of the panoptic map."""

BRANCHES = {
    "instance": ("rpn", "box_head", "mask_head", "fpn.instance"),
    "semantic": ("semantic_head", "fpn.semantic"),
}
"""The modules that only one task needs."""


class PanopticFPN(ExactConstants):
    """Predicts panoptic segmentation.

    Args:
        **settings: Fields of `PanopticFPNConfig`. The defaults make detectron2's R-50 COCO network.

    Raises:
        TypeError: If the configuration has no setting of a given name.
        ValueError: If a setting has an invalid value.
        ImportError: If the backbone belongs to torchvision or timm and this library is not installed.

    Example:
        >>> model = PanopticFPN(num_things=2, num_stuff=3).eval()
        >>> [output] = model([torch.zeros(3, 40, 60, dtype=torch.uint8)])
        >>> output.panoptic.shape
        torch.Size([40, 60])
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        config = PanopticFPNConfig().replace(**settings)
        self.config = config
        self.backbone: ResNet | FeatureExtractor
        if config.backbone in BACKBONES:
            self.backbone = ResNet(config.backbone, config.stride_in_1x1, config.backbone_norm)
        else:
            self.backbone = FeatureExtractor(config.backbone, config.backbone_norm)
        self.fpn: FPN | nn.ModuleDict
        if config.fpn_groups == 1:
            self.fpn = FPN(self.backbone.out_channels, config.fpn_channels)
        else:
            self.fpn = nn.ModuleDict(
                {task: FPN(self.backbone.out_channels, config.branch_channels) for task in config.tasks}
            )
        if "instance" in config.tasks:
            self.rpn = RPN(config)
            self.box_head = BoxHead(config)
            self.mask_head = MaskHead(config)
        if "semantic" in config.tasks:
            self.semantic_head = SemanticHead(config)
        self.add_constant("pixel_mean", config.pixel_mean)
        self.add_constant("pixel_std", config.pixel_std)

    @classmethod
    def from_config(cls, config: PanopticFPNConfig | str) -> PanopticFPN:
        """Builds a network with untrained weights.

        Args:
            config: The settings, or the name of a preset such as `"panoptic_fpn_r50"`.

        Returns:
            A network in training mode, like every new PyTorch module; call `.eval()` to predict.

        Raises:
            TypeError: If `config` is neither a configuration nor a string.
            ValueError: If no preset has this name.
        """
        if isinstance(config, str):
            config = get_preset(config)
        if not isinstance(config, PanopticFPNConfig):
            raise TypeError(
                f"config: expected a PanopticFPNConfig or the name of a preset, got {type(config).__name__}"
            )
        return cls(**vars(config))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the convolutions' weights, and therefore of images and features."""
        weight = next(self.backbone.parameters())
        plain = weight.dim() != 4 or weight.is_contiguous()
        return torch.contiguous_format if plain else torch.channels_last

    def prepare(self, images: Sequence[Tensor]) -> ImageBatch:
        """Orders the channels of images, normalises them and pads them to one batch.

        Args:
            images: RGB images [3, h, w] with values from 0 to 255, uint8 or floating, of any sizes.

        Returns:
            The batch, in the network's dtype and on its device.

        Raises:
            TypeError: If an image is not a tensor of uint8 or a floating dtype.
            ValueError: If an image has the wrong shape or no pixels.
        """
        for i, image in enumerate(images):
            _check_image(i, image)
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        multiple = self.config.size_divisibility
        height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
        batch = torch.zeros(len(images), 3, height, width, dtype=self.dtype, device=self.device)
        batch = batch.contiguous(memory_format=self.memory_format)
        for i, image in enumerate(images):
            x = self.normalize(image.to(self.device, non_blocking=True))
            batch[i, :, : x.shape[1], : x.shape[2]] = x
        return ImageBatch(batch, sizes)

    def normalize(self, images: Tensor) -> Tensor:
        """Orders the channels of RGB images [..., 3, H, W], 0 to 255, and normalises them in float32 or float64."""
        x = images.to(at_least_float32(self.dtype))
        if self.config.channel_order == "BGR":
            x = x.flip(-3)
        return (x - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]

    def features(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        """Computes the input of the branches.

        Args:
            images: Prepared images [N, 3, H, W].
            tasks: Some of the network's tasks; None for all.

        Returns:
            P2 to P6 for each task; branches that share an FPN get the same tensors.
        """
        tasks = self.config.tasks if tasks is None else tasks
        found = self.backbone(images)
        if isinstance(self.fpn, FPN):
            return dict.fromkeys(tasks, self.fpn(found))
        return {task: self.fpn[task](found) for task in tasks}

    @torch.no_grad()
    def forward(
        self,
        images: Sequence[Tensor],
        output_sizes: Sequence[tuple[int, int]] | None = None,
        instances: Wanted = "all",
    ) -> list[PanopticOutput]:
        """Predicts images.

        Args:
            images: RGB images [3, h, w] with values from 0 to 255, uint8 or floating, already resized for the
                network. They may differ in size.
            output_sizes: Height and width of each result, usually the size of the photograph before it was resized;
                None for the size of each image.
            instances: "all", or "panoptic" to leave out the instances whose score is below
                `config.instance_score_threshold`, for which no masks are computed. The panoptic map and the segments
                are bit-identical, since merging drops these instances.

        Returns:
            One `PanopticOutput` per image.

        Raises:
            TypeError: If an image is not a tensor of uint8 or a floating dtype.
            ValueError: If an image has the wrong shape, `output_sizes` has the wrong length or a size below 1, or
                `instances` is another word.

        Note:
            The configuration decides the inference semantics: detectron2's (`PanopticFPN.inference`) by default,
            mmdetection's for its checkpoints. One difference to both frameworks is that NMS compares classes by id,
            while for few boxes their NMS shifts the boxes of each class apart.
        """
        check_wanted(instances)
        if len(images) == 0:
            return []
        batch, sizes = self.prepare_outputs(images, output_sizes)
        features = self.features(batch.images)
        found = self.instances(features, batch.sizes, sizes, instances)
        labels = self.labels(features, batch.sizes, sizes)
        return [merge(self.config, *each) for each in zip(found, labels, strict=True)]

    def prepare_outputs(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[ImageBatch, list[tuple[int, int]]]:
        """Checks the arguments of `forward`; returns the batch and the size of each result."""
        batch = self.prepare(images)
        if output_sizes is None:
            return batch, batch.sizes
        return batch, _check_output_sizes(output_sizes, len(images))

    def instances(
        self,
        features: Mapping[str, Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
        wanted: Wanted = "all",
    ) -> list[InstanceOutput]:
        """Detects instances.

        Args:
            features: The result of the method `features`.
            sizes: Height and width of each image without padding.
            output_sizes: Height and width of each result.
            wanted: "all", or "panoptic" for the instances that merging does not drop for their score.

        Returns:
            The detections of each image; a network without the instance branch detects nothing.
        """
        if "instance" not in self.config.tasks:
            return [self._no_instances() for _ in sizes]
        pyramid = features["instance"]
        objectness, moves = self.rpn(pyramid)
        proposals = self.rpn.propose(self.rpn.anchors(pyramid), objectness, moves, sizes)
        class_logits, deltas = self.box_head(pyramid, proposals)
        detections = self.box_head.detect(class_logits, deltas, proposals, sizes)
        counts = [
            len(found.boxes) if wanted == "all" else enough_score(self.config, found.scores)
            for found in detections
        ]
        masks = self.mask_head.predict(pyramid, detections, counts)
        detections = [
            Detections(*(column[:count] for column in found))
            for found, count in zip(detections, counts, strict=True)
        ]
        return [_resize(*each) for each in zip(detections, masks, sizes, output_sizes, strict=True)]

    def _no_instances(self) -> InstanceOutput:
        scores = torch.zeros(0, dtype=at_least_float32(self.dtype), device=self.device)
        side = 2 * self.config.mask_pool_size
        classes = scores.to(torch.int64)
        return InstanceOutput(scores.reshape(0, 4), scores, classes, scores.reshape(0, side, side))

    def labels(
        self,
        features: Mapping[str, Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Labels pixels.

        Args:
            features: The result of the method `features`.
            sizes: Height and width of each image without padding.
            output_sizes: Height and width of each result.

        Returns:
            The labels [H, W] of each image: 0 is things, stuff starts at 1. A network without the semantic branch
            returns zeros.
        """
        return self.label(self.semantic_logits(features), sizes, output_sizes)

    def semantic_logits(self, features: Mapping[str, Sequence[Tensor]]) -> Tensor | None:
        """Returns the semantic branch's logits [N, K, H/4, W/4]; None for a network without this branch."""
        return self.semantic_head(features["semantic"]) if "semantic" in self.config.tasks else None

    def label(
        self,
        logits: Tensor | None,
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Converts the result of `semantic_logits` to that of `labels`."""
        if logits is None:
            return [torch.zeros(size, dtype=torch.uint8, device=self.device) for size in output_sizes]
        return self.semantic_head.label(logits, sizes, output_sizes)


def _resize(
    detections: Detections, mask_probs: Tensor, size: tuple[int, int], output_size: tuple[int, int]
) -> InstanceOutput:
    """Scales the detections of an image to the output size, and drops boxes without area there."""
    boxes = clip_boxes(scale_boxes(detections.boxes, size, output_size), output_size)
    keep = nonempty(boxes)
    return InstanceOutput(boxes[keep], detections.scores[keep], detections.classes[keep], mask_probs[keep])


def check_wanted(instances: object) -> None:
    """Raises ValueError if the argument `instances` is not one of the words in `Wanted`."""
    if instances not in get_args(Wanted):
        raise ValueError(f"instances: expected 'all' or 'panoptic', got {instances!r}")


def enough_score(config: PanopticFPNConfig, scores: Tensor) -> int:
    """Counts the instances that merging does not drop for their score; the others follow them, with lower scores."""
    # `ops.panoptic_merge` compares float32 scores with a float64 threshold.
    return int((scores.float().double() >= config.instance_score_threshold).sum())


def merge(config: PanopticFPNConfig, instances: InstanceOutput, semantic: Tensor) -> PanopticOutput:
    """Merges the instances and the stuff of an image.

    Args:
        config: The thresholds.
        instances: The detections.
        semantic: Labels [H, W]: 0 is things, stuff starts at 1.

    Returns:
        The prediction, in the size of `semantic`.
    """
    panoptic, segments = ops.panoptic_merge(
        instances.mask_probs,
        instances.boxes,
        instances.scores,
        instances.classes,
        semantic,
        (semantic.shape[0], semantic.shape[1]),
        **merge_settings(config),
    )
    return PanopticOutput(panoptic, segments, *instances, semantic)


def merge_settings(config: PanopticFPNConfig) -> dict[str, Any]:
    """Returns the thresholds and the rule for merging as arguments of `ops.panoptic_merge`."""
    return {
        "score_threshold": config.instance_score_threshold,
        "overlap_threshold": config.overlap_threshold,
        "stuff_area_threshold": config.stuff_area_threshold,
        "mask_threshold": config.mask_threshold,
        "rule": config.fusion_rule,
    }


def _check_image(index: int, image: object) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"images[{index}]: expected a tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"images[{index}]: expected uint8 or a floating dtype, got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"images[{index}]: expected shape [3, h, w], got {list(image.shape)}")


def _check_output_sizes(sizes: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    if len(sizes) != count:
        raise ValueError(f"output_sizes: expected {count} sizes, one per image, got {len(sizes)}")
    for i, size in enumerate(sizes):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"output_sizes[{i}]: expected (height, width) of at least 1, got {tuple(size)}")
    return [(int(height), int(width)) for height, width in sizes]
