"""Inputs like those of a detector on COCO, made on the CPU from a seed, so that every device gets the same ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Sizes of a COCO image after detectron2's resizing, of this image padded to a multiple of 32 pixels (the stride of P5),
# and of a Cityscapes image enlarged by 2.
IMAGE = (800, 1333)
PADDED = (800, 1344)
LARGE = (2048, 4096)

THINGS = 80
STUFF = 53
PYRAMID_SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


class Detections(NamedTuple):
    """The outputs of the box head and the mask head for one image."""

    masks: Tensor  # float32 [N, 28, 28], probabilities
    boxes: Tensor  # float32 [N, 4]
    scores: Tensor  # float32 [N], all different
    classes: Tensor  # int64 [N], below THINGS


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _log_uniform(count: int, low: float, high: float, random: torch.Generator) -> Tensor:
    exponent = torch.rand(count, generator=random, dtype=torch.float64)
    return low * (high / low) ** exponent


def _clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0.0), limit)


def boxes(count: int, size: tuple[int, int] = IMAGE, *, seed: int = 0) -> Tensor:
    """Makes boxes of log-uniform size at uniform positions in an image.

    Args:
        count: Number of boxes.
        size: (height, width) of the image; boxes are clipped to it.
        seed: Seed of the random numbers.

    Returns:
        float32 [count, 4]. Before clipping, the square roots of the areas are 16 to 800 pixels, and the aspect ratios
        are 1:2 to 2:1.
    """
    random = _generator(seed)
    side = _log_uniform(count, 16.0, 800.0, random)
    stretch = _log_uniform(count, math.sqrt(0.5), math.sqrt(2.0), random)
    extent = torch.stack([side * stretch, side / stretch], dim=1)
    centre = torch.rand(count, 2, generator=random, dtype=torch.float64)
    centre = centre * torch.tensor([size[1], size[0]], dtype=torch.float64)
    return _clip(torch.cat([centre - extent / 2, centre + extent / 2], dim=1), size).float()


def proposals(count: int, size: tuple[int, int] = IMAGE, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Makes boxes like the output of an RPN or a box head before suppression: half of them crowd around objects.

    Args:
        count: Number of boxes.
        size: (height, width) of the image.
        seed: Seed of the random numbers.

    Returns:
        Boxes float32 [count, 4] and scores float32 [count], all different. About twenty boxes surround each object, at
        offsets of a tenth of its sides.
    """
    random = _generator(seed + 1)
    background = boxes(count, size, seed=seed)
    objects = boxes(max(count // 40, 1), size, seed=seed + 2)
    nearest = objects[torch.randint(len(objects), (count,), generator=random)]
    extent = (nearest[:, 2:] - nearest[:, :2]).repeat(1, 2)
    crowd = _clip(nearest + 0.1 * extent * torch.randn(count, 4, generator=random), size)
    crowd = torch.cat(
        [torch.minimum(crowd[:, :2], crowd[:, 2:]), torch.maximum(crowd[:, :2], crowd[:, 2:])], 1
    )
    in_crowd = torch.rand(count, 1, generator=random) < 0.5
    # Equal scores would leave the order of the kept boxes undefined, and results could not be compared with a peer.
    scores = (torch.randperm(count, generator=random).float() + 0.5) / count
    return torch.where(in_crowd, crowd, background), scores


def groups(count: int, *, seed: int = 0) -> Tensor:
    """Makes a random thing class for each box, int64 [count]."""
    return torch.randint(THINGS, (count,), generator=_generator(seed + 3))


def mask_probabilities(count: int, *, side: int = 28, seed: int = 0) -> Tensor:
    """Makes soft blobs that fill most of their box and have a ragged boundary, float32 [count, side, side]."""
    axis = torch.linspace(-1, 1, side)
    noise = torch.randn(count, side, side, generator=_generator(seed + 4))
    return torch.sigmoid(4 * (0.7 - axis[:, None] ** 2 - axis**2) + 0.7 * noise)


def detections(count: int, size: tuple[int, int] = IMAGE, *, seed: int = 0) -> Detections:
    """Makes the detections of one image, with scores above 0.5."""
    order = torch.randperm(count, generator=_generator(seed + 5)).float()
    return Detections(
        masks=mask_probabilities(count, seed=seed),
        boxes=boxes(count, size, seed=seed),
        scores=0.5 + (order + 0.5) / (2 * count),
        classes=groups(count, seed=seed),
    )


def image(size: tuple[int, int] = IMAGE, *, seed: int = 0) -> Tensor:
    """Makes an image of patches, each of one colour with noise: uint8 [3, height, width], RGB.

    The side of a patch is a sixth of the height.
    """
    random = _generator(seed + 9)
    labels = semantic_labels(size, seed=seed)
    colours = torch.randint(40, 216, (STUFF + 1, 3), generator=random, dtype=torch.int16)
    noise = torch.randint(-32, 33, (*size, 3), generator=random, dtype=torch.int16)
    return (colours[labels] + noise).to(torch.uint8).permute(2, 0, 1).contiguous()


def semantic_labels(size: tuple[int, int] = IMAGE, *, seed: int = 0) -> Tensor:
    """Makes a label map like the arg max of semantic logits, int64 [H, W].

    Each patch of one label has a side of a sixth of the height.
    """
    height, width = size
    patch = height // 6
    rows, columns = -(-height // patch), -(-width // patch)
    labels = torch.randint(STUFF + 1, (rows, columns), generator=_generator(seed + 6))
    return labels.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width].contiguous()


def pyramid(
    size: tuple[int, int] = PADDED,
    *,
    channels: int = 256,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> list[Tensor]:
    """Makes normally distributed feature maps P2 to P5 of one image, [1, channels, height / 4, width / 4] and so on."""
    random = _generator(seed + 7)
    return [
        torch.randn(1, channels, int(size[0] * scale), int(size[1] * scale), generator=random)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for scale in PYRAMID_SCALES
    ]


def semantic_logits(
    size: tuple[int, int] = PADDED,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> Tensor:
    """Makes logits like the output of a trained head, [1, STUFF + 1, height / 4, width / 4].

    The logits are normally distributed; the logit of the correct class is raised by six.
    """
    labels = semantic_labels(size, seed=seed)[None, None, 2::4, 2::4]
    logits = torch.randn(1, STUFF + 1, *labels.shape[2:], generator=_generator(seed + 8))
    logits.scatter_add_(1, labels, torch.full(labels.shape, 6.0))
    return logits.to(dtype).contiguous(memory_format=memory_format)


def semantic_target(size: tuple[int, int] = PADDED, *, seed: int = 0) -> Tensor:
    """Makes the labels of a padded image, int64 [1, height, width], with 255 in the padding."""
    target = semantic_labels(size, seed=seed)[None].clone()
    target[:, IMAGE[0] :] = 255
    target[:, :, IMAGE[1] :] = 255
    return target
