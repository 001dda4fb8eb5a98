"""Pastes instance masks into the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Resamples each mask into its box of the image and thresholds it.

    Pixel (0, 0) of the image is sampled at its centre (0.5, 0.5). For example, a mask of ones in the box
    (10, 10, 20, 20) sets exactly the pixels 10..19 along both axes.

    Args:
        masks: [N, M_h, M_w] or [N, 1, M_h, M_w], values in 0..1; float32, float16, bfloat16, bool, or float64 on the
            CPU.
        boxes: [N, 4] rows of (x1, y1, x2, y2) in pixels of the image; float32, float16, bfloat16 or float64.
        image_size: (height, width) of the image.
        threshold: A pixel is set if its interpolated value is at least this. With a negative threshold, the op returns
            the values themselves, multiplied by 255 and truncated.

    Returns:
        bool [N, height, width] on the device of `masks`; uint8 for a negative threshold.

    Raises:
        TypeError: If `masks` or `boxes` is not a tensor of one of these dtypes, `image_size` is not a sequence of
            integers, or `threshold` is not a number.
        ValueError: If `masks` or `boxes` has another shape, they are on different devices, `image_size` is negative or
            does not have two values, or `threshold` is NaN.

    Note:
        Equals detectron2's paste_masks_in_image over the whole image (skip_empty=False), with the same order of float32
        operations. Half-precision inputs are converted to float32. Boxes that are empty or have NaN or infinite
        coordinates paste nothing. Deterministic; no host sync.

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


@_register.register_fake("paste_masks")
def _fake(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    dtype = torch.uint8 if threshold < 0 else torch.bool
    return masks.new_empty((masks.shape[0], height, width), dtype=dtype)
