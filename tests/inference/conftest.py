from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from panfpn_fast.data import get_categories
from panfpn_fast.inference import Instances, PanopticResult, Segment


class Segments(NamedTuple):
    """The columns of the second result of `panfpn_fast.ops.panoptic_merge`."""

    id: Tensor
    isthing: Tensor
    label: Tensor
    score: Tensor
    area: Tensor
    instance: Tensor


class Output(NamedTuple):
    """The fields of `panfpn_fast.models.PanopticOutput`."""

    panoptic: Tensor
    segments: Segments
    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor
    semantic: Tensor


class HalvesModel(nn.Module):
    """Stand-in for a network. Detects a dog in the left half of any image and sky in the right half."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**{"categories": get_categories("coco_panoptic"), **config})
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.seen: list[Tensor] = []
        self.product_dtype: torch.dtype | None = None
        self.grad_enabled: bool | None = None

    def forward(self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]]) -> list[Output]:
        self.seen = list(images)
        self.product_dtype = (self.weight @ self.weight).dtype
        self.grad_enabled = torch.is_grad_enabled()
        return [_halves(height, width) for height, width in output_sizes]


def _halves(height: int, width: int) -> Output:
    half = width // 2
    panoptic = torch.full((height, width), 2, dtype=torch.int32)
    panoptic[:, :half] = 1
    return Output(
        panoptic,
        Segments(
            id=torch.tensor([1, 2], dtype=torch.int32),
            isthing=torch.tensor([True, False]),
            label=torch.tensor([16, 40]),
            score=torch.tensor([0.75, 0.0]),
            area=torch.tensor([height * half, height * (width - half)]),
            instance=torch.tensor([0, -1]),
        ),
        boxes=torch.tensor([[0.0, 0.0, half, height]], dtype=torch.float16),
        scores=torch.tensor([0.75]),
        classes=torch.tensor([16]),
        mask_probs=torch.ones(1, 28, 28, dtype=torch.float16),
        semantic=torch.where(panoptic == 2, 40, 0).to(torch.uint8),
    )


@pytest.fixture
def halves_model() -> Callable[..., HalvesModel]:
    """Creates stand-in networks; keyword arguments become fields of `config`."""
    return HalvesModel


@pytest.fixture
def result() -> PanopticResult:
    """Result for a 120 x 200 image: two persons (top), grass (bottom) and a void column (right)."""
    panoptic = torch.full((120, 200), 3, dtype=torch.int32)
    panoptic[:60, :90] = 1
    panoptic[:60, 90:190] = 2
    panoptic[:, 190:] = 0
    segments = [
        Segment(1, 1, "person", True, 0, 0.9, 60 * 90, 0),
        Segment(2, 1, "person", True, 0, 0.8, 60 * 100, 1),
        Segment(3, 193, "grass-merged", False, 45, None, 60 * 190),
    ]
    instances = Instances(
        boxes=torch.tensor([[0.0, 0.0, 90.0, 60.0], [90.0, 0.0, 190.0, 60.0]]),
        scores=torch.tensor([0.9, 0.8]),
        classes=torch.zeros(2, dtype=torch.int64),
        mask_probs=torch.ones(2, 28, 28),
    )
    semantic = torch.where(panoptic == 3, 46, 0).to(torch.uint8)
    return PanopticResult(panoptic, segments, instances, semantic, get_categories("coco_panoptic"))
