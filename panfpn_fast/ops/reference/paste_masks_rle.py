"""COCO run lengths of pasted masks, in the format that pycocotools (maskApi) reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.ops.reference.paste_masks import paste_masks


def compress(lengths: Sequence[int]) -> bytes:
    """Writes run lengths as COCO's compressed string.

    Args:
        lengths: Of alternating runs, the first of which is off.

    Returns:
        For each length, from the fourth on less the one two before it, groups of five bits in two's complement,
        lowest first; 32 is added where more follow and 48 to every group.
    """
    text = bytearray()
    for i, length in enumerate(lengths):
        rest = length - lengths[i - 2] if i > 2 else length
        while True:
            group, rest = rest & 31, rest >> 5
            last = rest == (-1 if group & 16 else 0)
            text.append(48 + group + (0 if last else 32))
            if last:
                break
    return bytes(text)


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Pastes each mask and encodes it.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in [0, 1].
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image.
        image_size: (height, width).
        threshold: A pixel is set where the value is at least this; not negative.

    Returns:
        {"size": [height, width], "counts": bytes} for each mask.
    """
    encoded = []
    for pasted in paste_masks(masks, boxes, image_size, threshold):
        bits = torch.cat([torch.zeros(1, dtype=torch.bool), pasted.cpu().T.flatten()])
        # A run ends where a pixel differs from the one before it; the first is off, of no length if need be.
        ends = [*torch.nonzero(bits[1:] != bits[:-1])[:, 0].tolist(), len(bits) - 1]
        lengths = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        encoded.append({"size": list(pasted.shape), "counts": compress(lengths)})
    return encoded
