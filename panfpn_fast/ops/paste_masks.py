"""Pasting of instance masks into the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, reference


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Resamples each mask from the grid of its box to the pixels of the image and thresholds it.

    Pixel (0, 0) of the image is sampled at its centre (0.5, 0.5): a mask of ones in the box (10, 10, 20, 20) sets
    exactly the pixels 10..19 along both sides.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, float64 or bool.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image, floating.
        image_size: (height, width) of the image.
        threshold: A pixel is set where the interpolated value is at least this. A negative one asks for the
            values themselves, times 255 and truncated.

    Returns:
        bool [N, height, width], or uint8 for a negative threshold, on the device of `masks`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: An argument has the wrong shape, device or value.

    Note:
        Equals detectron2's paste_masks_in_image over the whole image (skip_empty=False), in its order of float32
        operations; half-precision inputs are upcast, not computed in half. Boxes without extent or with NaN or
        infinite coordinates paste nothing. Deterministic; no host sync.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> pasted = ops.paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 10.0, 20.0, 20.0]]), (32, 32))
        >>> int(pasted.sum())
        100
    """
    masks = _checks.check_masks(masks)
    _checks.check_boxes("boxes", boxes, masks.shape[0])
    _checks.check_device("boxes", boxes, masks.device, "masks")
    height, width = _checks.image_size_pair(image_size)
    _checks.check_number("threshold", threshold)
    masks = _checks.full_precision(masks)
    boxes = boxes.to(masks.dtype)
    if not _load.native(masks.device):
        return reference.paste_masks(masks, boxes, (height, width), threshold)
    return torch.ops.panfpn_fast.paste_masks(masks, boxes, height, width, threshold)


@_load.register_fake("paste_masks")
def _fake(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    dtype = torch.uint8 if threshold < 0 else torch.bool
    return masks.new_empty((masks.shape[0], height, width), dtype=dtype)
