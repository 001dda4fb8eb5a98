"""Panoptic FPN (Kirillov et al., CVPR 2019): one feature pyramid, an instance and a semantic branch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.backbone import ResNet
from panfpn_fast.models.boxes import clip_boxes, nonempty, scale_boxes
from panfpn_fast.models.config import BACKBONES, PanopticFPNConfig, get_preset
from panfpn_fast.models.feature_extractor import FeatureExtractor
from panfpn_fast.models.fpn import FPN
from panfpn_fast.models.layers import ExactConstants, at_least_float32
from panfpn_fast.models.roi_heads import BoxHead, Detections, MaskHead
from panfpn_fast.models.rpn import RPN
from panfpn_fast.models.semantic_head import SemanticHead
from panfpn_fast.ops import PanopticSegments

BRANCHES = {
    "instance": ("rpn", "box_head", "mask_head", "fpn.instance"),
    "semantic": ("semantic_head", "fpn.semantic"),
}
"""The modules that each task needs, and no other."""


class PanopticOutput(NamedTuple):
    """One image's prediction, at the output size [H, W]."""

    panoptic: Tensor
    """int32 [H, W]: each pixel's segment id, 0 = void."""
    segments: PanopticSegments
    """The table of segments that the ids refer to."""
    boxes: Tensor
    """[N, 4] in pixels of the output, by descending score."""
    scores: Tensor
    """[N], probabilities."""
    classes: Tensor
    """int64 [N], contiguous thing classes from 0."""
    mask_probs: Tensor
    """[N, 28, 28], the instance's probability inside its box."""
    semantic: Tensor
    """uint8 [H, W]: 0 = "other" (all things), 1.. = stuff."""


class Instances(NamedTuple):
    """One image's detections, at the output size; the fields are those of :class:`PanopticOutput`."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor


class ImageBatch(NamedTuple):
    """Normalised images, padded right and bottom to one size."""

    images: Tensor  # [N, 3, H, W]
    sizes: list[tuple[int, int]]  # height and width of each without padding


class PanopticFPN(ExactConstants):
    """Predicts panoptic segmentation.

    Args:
        **settings: fields of :class:`PanopticFPNConfig`; its defaults make detectron2's R-50 COCO network.

    Raises:
        TypeError: a setting that the configuration does not have.
        ValueError: a value that a setting cannot take.
        ImportError: the backbone is torchvision's or timm's, which is not installed.

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
        """Builds the network, with untrained weights.

        Args:
            config: the settings, or a preset's name: ``"panoptic_fpn_r50"``.

        Returns:
            A network in training mode, as PyTorch makes modules; call ``.eval()`` to predict.

        Raises:
            TypeError: ``config`` is something else.
            ValueError: no preset has that name.
        """
        if isinstance(config, str):
            config = get_preset(config)
        if not isinstance(config, PanopticFPNConfig):
            raise TypeError(
                f"config: expected a PanopticFPNConfig or a preset's name, got {type(config).__name__}"
            )
        return cls(**vars(config))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint with settings, class names and colours; ``panfpn_fast.load(path)`` needs nothing else.

        Args:
            path: ``.safetensors``, which needs the package safetensors, or ``.pth``; or ``.pkl``, which is written as
                detectron2 does. A file that is there is replaced when the new one is complete.

        Raises:
            ValueError: the path ends in something else, or detectron2 has no such network.
            ImportError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        from panfpn_fast.checkpoints import save  # which makes networks

        save(self, path)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return next(self.parameters()).dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """How the convolutions' weights, and therefore images and features, lie in memory."""
        weight = next(self.backbone.parameters())
        plain = weight.dim() != 4 or weight.is_contiguous()
        return torch.contiguous_format if plain else torch.channels_last

    def prepare(self, images: Sequence[Tensor]) -> ImageBatch:
        """Orders the channels, normalises, and pads to one batch.

        Args:
            images: RGB images [3, h, w] with values from 0 to 255, uint8 or floating, of any sizes.

        Returns:
            The batch, in the network's dtype and on its device.

        Raises:
            TypeError: an image is no tensor, or neither uint8 nor floating.
            ValueError: an image has another shape or no pixels.
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
        """Orders the channels of RGB images [..., 3, H, W], 0 to 255, and normalises; in float32 or float64."""
        x = images.to(at_least_float32(self.dtype))
        if self.config.channel_order == "BGR":
            x = x.flip(-3)
        return (x - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]

    def features(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, list[Tensor]]:
        """Computes what the branches see.

        Args:
            images: prepared images [N, 3, H, W].
            tasks: some of the network's; None: all.

        Returns:
            For each task P2..P6, the same tensors if the branches share them.
        """
        tasks = self.config.tasks if tasks is None else tasks
        found = self.backbone(images)
        if isinstance(self.fpn, FPN):
            return dict.fromkeys(tasks, self.fpn(found))
        return {task: self.fpn[task](found) for task in tasks}

    @torch.no_grad()
    def forward(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[PanopticOutput]:
        """Predicts.

        Args:
            images: RGB images [3, h, w] with values from 0 to 255, uint8 or floating, already resized to what
                the network should see; they may differ in size.
            output_sizes: height and width of each result, usually the size of the photograph before it was
                resized; None: the size of the image given.

        Returns:
            One :class:`PanopticOutput` per image.

        Raises:
            TypeError: an image is no tensor, or neither uint8 nor floating.
            ValueError: an image has another shape; ``output_sizes`` has another length or a size below 1.

        Note:
            Inference semantics are those that the configuration says: by default detectron2's
            (``PanopticFPN.inference``), of mmdetection's checkpoints mmdetection's. With one difference to both: NMS
            compares classes by id, where theirs, if boxes are few, shifts each class's boxes apart.
        """
        if len(images) == 0:
            return []
        batch, sizes = self.prepare_outputs(images, output_sizes)
        features = self.features(batch.images)
        found = self.instances(features, batch.sizes, sizes)
        labels = self.labels(features, batch.sizes, sizes)
        return [merge(self.config, *each) for each in zip(found, labels, strict=True)]

    def prepare_outputs(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[ImageBatch, list[tuple[int, int]]]:
        """Checks what :meth:`forward` takes; returns the batch and the size of each result."""
        batch = self.prepare(images)
        if output_sizes is None:
            return batch, batch.sizes
        return batch, _check_output_sizes(output_sizes, len(images))

    def instances(
        self,
        features: Mapping[str, Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Finds instances.

        Args:
            features: as :meth:`features` returns them.
            sizes: each image's height and width without padding.
            output_sizes: the height and width of each result.

        Returns:
            Per image, its detections; none of a network without the instance branch.
        """
        if "instance" not in self.config.tasks:
            return [self._no_instances() for _ in sizes]
        pyramid = features["instance"]
        objectness, moves = self.rpn(pyramid)
        proposals = self.rpn.propose(self.rpn.anchors(pyramid), objectness, moves, sizes)
        class_logits, deltas = self.box_head(pyramid, proposals)
        detections = self.box_head.detect(class_logits, deltas, proposals, sizes)
        masks = self.mask_head(
            pyramid, [d.boxes for d in detections], torch.cat([d.classes for d in detections])
        ).sigmoid()
        per_image = torch.split(masks, [len(d.boxes) for d in detections])
        return [_resize(*each) for each in zip(detections, per_image, sizes, output_sizes, strict=True)]

    def _no_instances(self) -> Instances:
        scores = torch.zeros(0, dtype=at_least_float32(self.dtype), device=self.device)
        side = 2 * self.config.mask_pool_size
        classes = scores.to(torch.int64)
        return Instances(scores.reshape(0, 4), scores, classes, scores.reshape(0, side, side))

    def labels(
        self,
        features: Mapping[str, Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Labels pixels.

        Args:
            features: as :meth:`features` returns them.
            sizes: each image's height and width without padding.
            output_sizes: the height and width of each result.

        Returns:
            Per image [H, W], 0 = things, 1.. = stuff; all 0 of a network without the semantic branch.
        """
        if "semantic" not in self.config.tasks:
            return [torch.zeros(size, dtype=torch.uint8, device=self.device) for size in output_sizes]
        return self.semantic_head.label(self.semantic_head(features["semantic"]), sizes, output_sizes)


def _resize(
    detections: Detections, mask_probs: Tensor, size: tuple[int, int], output_size: tuple[int, int]
) -> Instances:
    """Carries one image's detections over to the output's size, and drops what has no area there."""
    boxes = clip_boxes(scale_boxes(detections.boxes, size, output_size), output_size)
    keep = nonempty(boxes)
    return Instances(boxes[keep], detections.scores[keep], detections.classes[keep], mask_probs[keep])


def merge(config: PanopticFPNConfig, instances: Instances, semantic: Tensor) -> PanopticOutput:
    """Merges one image's instances with its stuff.

    Args:
        config: the thresholds.
        instances: the detections.
        semantic: [H, W], 0 = things, 1.. = stuff.

    Returns:
        The prediction, of the size of ``semantic``.
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
    """Returns a network's thresholds and rule for merging as `ops.panoptic_merge` calls them."""
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
