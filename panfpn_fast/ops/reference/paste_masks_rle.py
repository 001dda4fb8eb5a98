"""Run-length encoding of pasted masks in the COCO format that pycocotools (maskApi) reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.ops.reference.paste_masks import paste_masks


def compress(lengths: Sequence[int]) -> bytes:
    """Encodes run lengths as COCO's compressed string.

    Args:
        lengths: Lengths of alternating runs of unset and set pixels, starting with unset ones.

    Returns:
        The encoded lengths. From the fourth on, a length is replaced by its difference to the length two places
        before. Each number is written in two's complement as groups of five bits, lowest group first. A group gets
        32 added if more groups of the number follow, and 48 in any case.
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
    """Pastes each mask into its image and encodes the result.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in [0, 1].
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image.
        image_size: (height, width).
        threshold: A pixel is set if its value is at least this; not negative.

    Returns:
        A dictionary {"size": [height, width], "counts": bytes} for each mask.
    """
    encoded = []
    for pasted in paste_masks(masks, boxes, image_size, threshold):
        bits = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), pasted.cpu().T.flatten()])
        # A run ends where the value changes. The first run is of unset pixels and may have length 0.
        ends = [*torch.nonzero(bits[1:] != bits[:-1])[:, 0].tolist(), len(bits) - 1]
        lengths = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        encoded.append({"size": list(pasted.shape), "counts": compress(lengths)})
    return encoded
