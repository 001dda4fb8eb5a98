"""The semantic head in eager PyTorch, which upsamples every level before the predictor, as in detectron2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.models.semantic_head import SemanticHead


def eager_head(head: SemanticHead, features: list[Tensor]) -> Tensor:
    """Computes class logits at 1/4 of the resolution with the weights of a head."""
    total: Tensor | None = None
    for level, (stages, x) in enumerate(zip(head.levels.values(), features, strict=True)):
        for stage in stages:  # type: ignore[attr-defined]
            x = F.relu(stage.norm(F.conv2d(x, stage.conv.weight, padding=1)))
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        total = x if total is None else total + x
    assert total is not None
    return F.conv2d(total, head.logits.weight, head.logits.bias)


def eager_loss(head: SemanticHead, features: list[Tensor], targets: Tensor) -> Tensor:
    """Computes the mean cross-entropy at the input's resolution."""
    logits = F.interpolate(eager_head(head, features), scale_factor=4.0, mode="bilinear", align_corners=False)
    return F.cross_entropy(logits.float(), targets, ignore_index=255)
