"""A training step in eager PyTorch, with torchvision's ops and detectron2's order of operations.

It shares the sampling of anchors and boxes and the instance losses with `TrainingNetwork`, which are plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models import backbone
from panfpn_fast.training.network import TrainingNetwork

from ..harness.peers import torchvision_ops


def _cross_entropy(logits: Tensor, target: Tensor, scale_factor: int, **options: Any) -> Tensor:
    upsampled = F.interpolate(
        logits.float(), scale_factor=float(scale_factor), mode="bilinear", align_corners=False
    )
    return F.cross_entropy(upsampled, target.long(), **options)


def _nms_padded(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, size: int
) -> tuple[Tensor, Tensor]:
    """Applies torchvision's NMS image by image, and pads the indices that it keeps with -1."""
    found = torch.full((len(boxes), size), -1, dtype=torch.int64)
    counts = torch.zeros(len(boxes), dtype=torch.int64)
    for i, image in enumerate(zip(boxes, scores, groups, strict=True)):
        keep = torchvision_ops().batched_nms(*image, threshold)[:size]
        found[i, : len(keep)], counts[i] = keep, len(keep)
    return found, counts


def _roi_align(masks: Tensor, boxes: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    output: Tensor = torchvision_ops().roi_align(masks, boxes, size, scale, ratio, aligned)
    return output


def _conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False, added: Tensor | None = None
) -> Tensor:
    y: Tensor = norm(conv(x))
    y = y if added is None else y + added
    return F.relu_(y) if relu else y


@contextmanager
def _eager_ops() -> Iterator[None]:
    """Replaces the ops that training calls outside of the heads, and the fused convolutions of the backbone."""
    replaced = patch.multiple(
        ops, upsample_cross_entropy=_cross_entropy, nms_padded=_nms_padded, roi_align=_roi_align
    )
    with replaced, patch.object(backbone, "conv_norm", _conv_norm), ops.winograd(False):
        yield


class EagerTrainingNetwork(TrainingNetwork):
    """Computes the losses of an `EagerPanopticFPN`."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with _eager_ops():
            return super().forward(*args, **kwargs)
