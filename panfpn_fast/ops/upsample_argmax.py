"""Semantic labels straight from low-resolution logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast.ops import _checks, _register, reference

_MAX_CLASSES = 32767  # the largest int16
_MAX_FACTOR = 2**24  # with larger factors, sizes might overflow


@overload
def upsample_argmax(
    logits: Tensor,
    scale_factor: int = ...,
    *,
    crop: Sequence[int] | None = ...,
    size: Sequence[int] | None = ...,
    return_prob: Literal[False] = ...,
) -> Tensor: ...


@overload
def upsample_argmax(
    logits: Tensor,
    scale_factor: int = ...,
    *,
    crop: Sequence[int] | None = ...,
    size: Sequence[int] | None = ...,
    return_prob: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def upsample_argmax(
    logits: Tensor,
    scale_factor: int = ...,
    *,
    crop: Sequence[int] | None = ...,
    size: Sequence[int] | None = ...,
    return_prob: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def upsample_argmax(
    logits: Tensor,
    scale_factor: int = 4,
    *,
    crop: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    return_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Labels each pixel with the class of its largest logit, after resampling the logits to the size of the image.

    This takes one bilinear upsampling, or two resamplings if the network's input was a resized and padded photograph:
    to the size of that input, whose padding is then cropped, and to the size of the photograph. Pixel centers are at
    half coordinates (align_corners=False): with a factor of 4, pixel 2 of the output is at (2 + 0.5) / 4 = 0.625 in the
    input, an eighth of the way from the center of pixel 0 to the center of pixel 1. The resampled logits are never in
    memory. Each pixel has C of them, and the output has one or two bytes.

    Args:
        logits: [N, C, H, W] with 1 to 32,767 classes; float32, float16, bfloat16, or float64 on the CPU. NCHW or
            channels-last; on the CPU channels-last is a little faster.
        scale_factor: Factor of the first upsampling, from 1 to 2**24.
        crop: (height, width) of the part at the top left to keep after that; None for all.
        size: (height, width) to which this part is then resampled; None for no second resampling.
        return_prob: Whether to return the probabilities too.

    Returns:
        Labels [N, height, width] on the device of `logits`; uint8 for up to 256 classes, otherwise int16. With
        `return_prob` a tuple of the labels and the softmax probability of each pixel's label, float32
        [N, height, width].

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value.
        ImportError: If the implementation for the device cannot be loaded.

    Note:
        Equals F.interpolate by `scale_factor`, slicing, F.interpolate to `size`, and arg max, which is how detectron2
        and mmdetection process a network's logits. Both resamplings are computed in float32 (float64 for float64)
        without rounding in between. If several classes have the largest logit, the first of them wins; if logits differ
        by a rounding error, either class may win. NaN is larger than any number. Logits with a weight of 0 have no
        effect. F.interpolate multiplies them by 0, which gives NaN for infinities, so at the borders it can choose a
        class that is -inf everywhere; this op never does.

        Not differentiable. Deterministic. No host sync.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
        >>> ops.upsample_argmax(logits, 2)
        tensor([[[0, 0, 1, 1],
                 [0, 0, 1, 1]]], dtype=torch.uint8)
        >>> ops.upsample_argmax(logits, 2, crop=(2, 3), size=(1, 6))
        tensor([[[0, 0, 0, 0, 1, 1]]], dtype=torch.uint8)
    """
    height, width = _check_inputs(logits, scale_factor)
    if crop is not None:
        upsampled = (height, width)
        height, width = _checks.int_pair("crop", crop, 1)
        if height > upsampled[0] or width > upsampled[1]:
            raise ValueError(
                f"crop: expected at most the size of the upsampled logits {upsampled}, got {(height, width)}"
            )
    crop_height, crop_width = height, width
    if size is not None:
        if crop_height == 0 or crop_width == 0:
            raise ValueError(
                f"logits: expected at least one pixel to resample to {size}, got {list(logits.shape)}"
            )
        height, width = _checks.int_pair("size", size, 1)
    _checks.check_bool("return_prob", return_prob)
    if not _load.native(logits.device, in_triton=True):
        return reference.upsample_argmax(logits, scale_factor, crop=crop, size=size, return_prob=return_prob)
    labels, probabilities = torch.ops.panfpn_fast.upsample_argmax(
        logits.detach(), scale_factor, crop_height, crop_width, height, width, return_prob
    )
    return (labels, probabilities) if return_prob else labels


def _check_inputs(logits: Tensor, scale_factor: int) -> tuple[int, int]:
    """Returns the size of the upsampled image."""
    _checks.check_feature_map("logits", logits)
    if not 1 <= logits.shape[1] <= _MAX_CLASSES:
        raise ValueError(f"logits: expected 1 to {_MAX_CLASSES} classes, got {list(logits.shape)}")
    _checks.check_int("scale_factor", scale_factor)
    if not 1 <= scale_factor <= _MAX_FACTOR:
        raise ValueError(f"scale_factor: expected an integer from 1 to {_MAX_FACTOR}, got {scale_factor}")
    return logits.shape[2] * scale_factor, logits.shape[3] * scale_factor


@_register.register_fake("upsample_argmax")
def _fake(
    logits: Tensor,
    scale_factor: int,
    crop_height: int,
    crop_width: int,
    height: int,
    width: int,
    return_prob: bool,
) -> tuple[Tensor, Tensor]:
    size = (logits.shape[0], height, width)
    labels = logits.new_empty(size, dtype=torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    return labels, logits.new_empty(size if return_prob else (0,), dtype=torch.float32)


_register.implement_in_triton("upsample_argmax")
