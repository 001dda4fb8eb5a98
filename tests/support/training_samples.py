"""A small network and small annotated scenes for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from panfpn_fast.data.sample import Sample, Target, make_target
from panfpn_fast.models import PanopticFPN

SMALL: dict[str, Any] = {
    "backbone": "resnet10_narrow",
    "backbone_norm": "gn",
    "num_things": 3,
    "num_stuff": 4,
    "fpn_channels": 16,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "box_head_channels": 16,
    "mask_head_channels": 8,
    "mask_head_convs": 1,
    "semantic_channels": 16,
    "semantic_groups": 4,
    "stuff_area_threshold": 10,
}


def small_model(**settings: Any) -> PanopticFPN:
    """Returns an untrained network whose predictions differ between positions."""
    torch.manual_seed(0)
    model = PanopticFPN(**{**SMALL, **settings})
    for name, parameter in model.named_parameters():
        if name.startswith(("rpn.objectness", "rpn.deltas", "box_head.class_logits", "box_head.box_deltas")):
            torch.nn.init.normal_(parameter, std=0.1)
        if name.startswith(("mask_head.logits", "semantic_head.logits")):
            torch.nn.init.normal_(parameter, std=0.5)
    if "instance" in model.config.tasks:
        # Without this bias, anchors have exactly equal scores wherever ReLU leaves no channel above zero.
        torch.nn.init.constant_(model.rpn.get_parameter("conv.bias"), 0.5)
    return model


def make_sample(
    height: int, width: int, seed: int = 0, things: int = 3, crowd: bool = False, void: bool = False
) -> Sample:
    """Returns a scene of two stuff segments side by side, rectangular things in front of them, and a strip of void.

    The rectangles may overlap.

    Args:
        height: Height of the image.
        width: Width of the image.
        seed: Seed of colours and positions.
        things: Number of rectangles.
        crowd: Whether all rectangles are crowd regions.
        void: Whether all pixels are void.
    """
    random = torch.Generator().manual_seed(seed)
    segments = torch.ones(height, width, dtype=torch.int32)
    segments[:, width // 2 :] = 2
    for row in range(things):
        y, x = (int(torch.randint(0, side - 16, (), generator=random)) for side in (height, width))
        h, w = (int(side) for side in torch.randint(6, 24, (2,), generator=random))
        segments[y : y + h, x : x + w] = row + 3
    segments[-2:] = 0
    if void:
        segments.zero_()
    rows = 2 + things
    return Sample(
        image=torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8),
        segments=segments,
        isthing=torch.tensor([False] * 2 + [True] * things),
        label=torch.tensor([1, 4] + [row % 3 for row in range(things)]),
        crowd=torch.tensor([False] * 2 + [crowd] * things),
        area=torch.bincount(segments.flatten(), minlength=rows + 1)[1:],
        image_id=seed,
        file_name=f"{seed}.png",
    )


def make_batch(*samples: Sample) -> tuple[list[Tensor], list[Target], list[int]]:
    """Returns images, targets and seeds for `TrainingNetwork`."""
    return [s.image for s in samples], [make_target(s) for s in samples], list(range(11, 11 + len(samples)))
