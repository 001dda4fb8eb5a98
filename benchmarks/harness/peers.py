"""Other implementations of what the ops compute.

detectron2 cannot be installed everywhere, so its algorithms are reimplemented here in plain PyTorch. They follow the
behaviour of its poolers.py, mask_ops.py and panoptic_fpn.py: the same tensor operations, loops and host reads in the
same order.
"""

from __future__ import annotations

import functools
import importlib
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# detectron2 pastes on the GPU in chunks of this many bytes of float32 values.
_CHUNK_BYTES = 1024**3


def torchvision_ops() -> Any:
    """Imports `torchvision.ops`; call `torchvision_problem` first."""
    return importlib.import_module("torchvision.ops")


@functools.cache
def torchvision_problem(device: torch.device) -> str | None:
    """Returns why torchvision's binaries cannot be timed on a device, or None if they can."""
    try:
        torchvision_ops().nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except ModuleNotFoundError:
        return "torchvision is not installed"
    except (ImportError, RuntimeError) as error:
        return f"torchvision's ops do not run on {device.type}: {str(error).splitlines()[0]}"
    return None


@functools.cache
def pycocotools_problem(device: torch.device) -> str | None:
    """Returns why pycocotools cannot be timed, or None if it can; it runs on the host for every device."""
    try:
        importlib.import_module("pycocotools.mask")
    except ImportError as error:
        return f"pycocotools cannot be imported: {error}"
    return None


@functools.cache
def compile_problem(device: torch.device) -> str | None:
    """Returns why torch.compile cannot generate code for a device, or None if it can."""
    if device.type == "cpu":
        return (
            None if shutil.which("g++") or shutil.which("clang++") else "torch.compile finds no C++ compiler"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"torch.compile needs Triton: {error}"
    return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function with torch.compile for static shapes, at the first call, because its import is slow."""
    lazily = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args: lazily()(*args)


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Casts features to float32 and the result back, as autocast does for an op without half precision."""

    def cast(features: Tensor | Sequence[Tensor], *args: Any) -> Tensor:
        if isinstance(features, Tensor):
            return function(features.float(), *args).to(features.dtype)
        return function([level.float() for level in features], *args).to(features[0].dtype)

    return cast


def assign_levels(boxes: Tensor, scales: Sequence[float], epsilon: float = 1e-8) -> Tensor:
    """Returns the index of the pyramid level for each box, int64 [K]; a 224 px box gets the level of scale 1/16."""
    lowest, highest = round(-math.log2(scales[0])), round(-math.log2(scales[-1]))
    size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    level = torch.floor(4 + torch.log2(size / 224 + epsilon))
    return level.clamp(lowest, highest).to(torch.int64) - lowest


def detectron2_pooler(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: int,
    scales: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pools as `ROIPooler` does: one torchvision `roi_align` per level, on the boxes that `nonzero` finds for it."""
    roi_align = torchvision_ops().roi_align
    rois = torch.cat([F.pad(of_image, (1, 0), value=float(i)) for i, of_image in enumerate(boxes)])
    levels = assign_levels(rois[:, 1:], scales)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], output_size, output_size)
    for position, (level_features, scale) in enumerate(zip(features, scales, strict=True)):
        members = torch.nonzero(levels == position, as_tuple=True)[0]
        level_pooled = roi_align(
            level_features, rois[members], (output_size, output_size), scale, sampling_ratio, aligned
        )
        pooled.index_put_((members,), level_pooled)
    return pooled


def torchvision_multiscale(image_size: tuple[int, int]) -> Callable[..., Tensor]:
    """Adapts torchvision's `MultiScaleRoIAlign` to the arguments of `detectron2_pooler`."""

    def pool(
        features: Sequence[Tensor],
        boxes: Sequence[Tensor],
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        # The module always uses aligned=False and derives the scales from the sizes of the maps.
        assert not aligned
        names = [str(level) for level in range(len(features))]
        module = torchvision_ops().MultiScaleRoIAlign(names, output_size, sampling_ratio)
        pooled: Tensor = module(
            dict(zip(names, features, strict=True)), list(boxes), [image_size] * len(boxes)
        )
        return pooled

    return pool


def _sample(masks: Tensor, boxes: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Samples masks in a window of the image with one `grid_sample`; returns [N, rows, columns]."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # [N, 1] each
    y = torch.arange(rows[0], rows[1], device=masks.device, dtype=torch.float32) + 0.5
    x = torch.arange(columns[0], columns[1], device=masks.device, dtype=torch.float32) + 0.5
    y = (y - y0) / (y1 - y0) * 2 - 1  # [N, rows]
    x = (x - x0) / (x1 - x0) * 2 - 1  # [N, columns]
    shape = (len(masks), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _threshold(values: Tensor, threshold: float) -> Tensor:
    return values >= threshold if threshold >= 0 else (values * 255).to(torch.uint8)


def detectron2_paste(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Pastes as `paste_masks_in_image` does.

    On the CPU it samples each mask within its box, on the GPU all masks at all pixels in chunks of 1 GB.
    """
    height, width = image_size
    pasted = torch.zeros(
        len(masks), height, width, device=masks.device, dtype=torch.bool if threshold >= 0 else torch.uint8
    )
    if masks.device.type == "cpu":
        for n in range(len(masks)):
            x0, y0 = (boxes[n, :2].floor() - 1).clamp(min=0).to(torch.int32).tolist()
            x1 = min(int(boxes[n, 2].ceil()) + 1, width)
            y1 = min(int(boxes[n, 3].ceil()) + 1, height)
            values = _sample(masks[n : n + 1], boxes[n : n + 1], (y0, y1), (x0, x1))
            pasted[n : n + 1, y0:y1, x0:x1] = _threshold(values, threshold)
        return pasted
    chunks = math.ceil(len(masks) * height * width * 4 / _CHUNK_BYTES)
    for rows in torch.arange(len(masks), device=masks.device).chunk(max(chunks, 1)):
        pasted[rows] = _threshold(_sample(masks[rows], boxes[rows], (0, height), (0, width)), threshold)
    return pasted


def dense_paste(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Pastes as detectron2 does on the GPU, in one chunk; all shapes are static, so torch.compile can handle it."""
    return _threshold(_sample(masks, boxes, (0, image_size[0]), (0, image_size[1])), threshold)


def torchvision_paste(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Pastes with torchvision and applies the threshold that its users apply. It truncates boxes to integers."""
    roi_heads = importlib.import_module("torchvision.models.detection.roi_heads")
    pasted: Tensor = roi_heads.paste_masks_in_image(masks[:, None], boxes, image_size)
    return pasted[:, 0] >= threshold


def detectron2_merge(
    masks: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    semantic: Tensor,
    image_size: tuple[int, int],
    score_threshold: float = 0.5,
    overlap_threshold: float = 0.5,
    stuff_area_threshold: int = 4096,
) -> tuple[Tensor, list[tuple[bool, int]]]:
    """Pastes, then merges as `combine_semantic_and_instance_outputs` does.

    Returns:
        The panoptic map, and (isthing, label) of each segment.
    """
    pasted = detectron2_paste(masks, boxes, image_size)
    panoptic = torch.zeros_like(semantic, dtype=torch.int32)
    segments: list[tuple[bool, int]] = []
    for instance in torch.argsort(-scores):
        if scores[instance].item() < score_threshold:
            break
        mask = pasted[instance]
        area = mask.sum().item()
        if area == 0:
            continue
        taken = mask & (panoptic > 0)
        taken_area = taken.sum().item()
        if taken_area / area > overlap_threshold:
            continue
        if taken_area > 0:
            mask = mask & (panoptic == 0)
        segments.append((True, int(classes[instance].item())))
        panoptic[mask] = len(segments)
    for label in torch.unique(semantic).cpu().tolist():
        if label == 0:
            continue
        free = (semantic == label) & (panoptic == 0)
        if free.sum().item() < stuff_area_threshold:
            continue
        segments.append((False, label))
        panoptic[free] = len(segments)
    return panoptic, segments


def paste_then_encode(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Encodes as detectron2's evaluator does: each pasted mask in column order by pycocotools' `encode`."""
    coco = importlib.import_module("pycocotools.mask")
    pasted = detectron2_paste(masks, boxes, image_size, threshold).cpu().to(torch.uint8).numpy()
    return [coco.encode(mask[:, :, None].copy(order="F"))[0] for mask in pasted]
