"""ROIAlign over a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from panfpn_fast import _load
from panfpn_fast._layout import channels_last_only
from panfpn_fast.ops import _checks, _register, reference

_MAX_LEVELS = 8


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
    level_epsilon: float = 1e-8,
) -> Tensor:
    """Pools each box with ROIAlign from the pyramid level that suits its size, in one pass over all levels.

    A box with the sides (w, h) belongs to level floor(canonical_level + log2(sqrt(w h) / canonical_box_size +
    level_epsilon)), clamped to the available levels. For example, a 224 x 224 box belongs to level 4, whose scale is
    1/16.

    Args:
        features: 1 to 8 feature maps [N, C, H_l, W_l], finest first, all of the same dtype; float32, float16,
            bfloat16, or float64 on the CPU; NCHW or channels-last.
        boxes: [K, 5] rows of (image index, x1, y1, x2, y2), or a list with one tensor [L, 4] of (x1, y1, x2, y2) for
            each of the N images; float32, float16, bfloat16 or float64.
        output_size: Number of bins (height, width), or one number for both; at least 1.
        spatial_scales: Feature pixels per unit of box coordinates for each feature map: consecutive powers of two,
            for example (1/4, 1/8, 1/16, 1/32).
        sampling_ratio: Samples per bin along each axis, at most 1024. With 0 or less, this is the size of the bin in
            feature pixels, rounded up.
        aligned: Whether the centres of pixels are at half-integer coordinates, as in `roi_align`.
        canonical_box_size: Side of a square box that belongs to `canonical_level`, in units of box coordinates; finite
            and above 0.
        canonical_level: Level of a box with the side `canonical_box_size`. Level k has the scale 2**-k.
        level_epsilon: Offset in the logarithm. 1e-8 is detectron2's. mmdetection's is 1e-6, and torchvision adds 1e-6
            after the logarithm.

    Returns:
        [K, C, height, width] in the dtype and on the device of `features`; channels-last if all feature maps are.

    Raises:
        TypeError: If `features` is not a list of tensors of one of these dtypes, `boxes` is neither a tensor nor a list
            of tensors of one of these dtypes, or another argument is not of the type in the signature.
        ValueError: If `features` is empty, has more than 8 maps, or has maps that differ in N, C or device; if `boxes`
            has another shape, number of tensors or device; if `spatial_scales` are not consecutive powers of two, one
            for each map; or if a number is outside its range.

    Note:
        Equals detectron2's ROIPooler (ROIAlignV2 for `aligned=True`). The rule for levels is equation 1 of Feature
        Pyramid Networks (Lin et al. 2017). Boxes with NaN or infinite coordinates give zeros. Boxes of negative area
        belong to the finest level, whereas detectron2 assigns them to no level. No host sync. Differentiable once with
        respect to the features, and as deterministic as `roi_align`.

    Example:
        >>> import torch
        >>> from panfpn_fast import ops
        >>> pyramid = [torch.ones(1, 8, 64, 64), torch.ones(1, 8, 32, 32)]
        >>> ops.multiscale_roi_align(pyramid, [torch.tensor([[8.0, 8.0, 40.0, 40.0]])], 7, (1 / 4, 1 / 8)).shape
        torch.Size([1, 8, 7, 7])
    """
    _check_features(features)
    _check_scales(spatial_scales, len(features))
    rois = _checks.batched_boxes(boxes, features[0].shape[0], features[0])
    height, width = _checks.int_pair("output_size", output_size, 1)
    _checks.check_sampling_ratio(sampling_ratio)
    _checks.check_bool("aligned", aligned)
    _checks.check_positive("canonical_box_size", canonical_box_size)
    _checks.check_int("canonical_level", canonical_level)
    _checks.check_number("level_epsilon", level_epsilon)
    if not _load.native(features[0].device):
        return reference.multiscale_roi_align(
            features,
            rois,
            (height, width),
            spatial_scales,
            sampling_ratio,
            aligned,
            canonical_box_size,
            canonical_level,
            level_epsilon,
        )
    return torch.ops.panfpn_fast.multiscale_roi_align(
        features,
        rois,
        spatial_scales,
        height,
        width,
        sampling_ratio,
        aligned,
        canonical_box_size,
        canonical_level,
        level_epsilon,
    )


def _check_features(features: Sequence[Tensor]) -> None:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"features: expected a list of tensors [N, C, H, W], got {type(features).__name__}")
    if not 1 <= len(features) <= _MAX_LEVELS:
        raise ValueError(f"features: expected 1 to {_MAX_LEVELS} feature maps, got {len(features)}")
    for i, feature in enumerate(features):
        _checks.check_feature_map(f"features[{i}]", feature)
        _checks.check_device(f"features[{i}]", feature, features[0].device, "features[0]")
        if feature.dtype != features[0].dtype:
            raise TypeError(
                f"features[{i}]: expected {features[0].dtype}, the dtype of features[0], got {feature.dtype}"
            )
        if feature.shape[:2] != features[0].shape[:2]:
            raise ValueError(
                f"features[{i}]: expected N and C to be {list(features[0].shape[:2])}, as in features[0], "
                f"got {list(feature.shape[:2])}"
            )


def _check_scales(spatial_scales: Sequence[float], levels: int) -> None:
    if not isinstance(spatial_scales, Sequence):
        raise TypeError(f"spatial_scales: expected a list of numbers, got {type(spatial_scales).__name__}")
    if len(spatial_scales) != levels:
        raise ValueError(
            f"spatial_scales: expected {levels} numbers, one for each feature map, got {len(spatial_scales)}"
        )
    for i, scale in enumerate(spatial_scales):
        _checks.check_positive(f"spatial_scales[{i}]", scale)
        if scale * 2**i != spatial_scales[0] or (i == 0 and math.frexp(scale)[0] != 0.5):
            raise ValueError(
                f"spatial_scales: expected consecutive powers of two, finest first, got {tuple(spatial_scales)}"
            )


@_register.register_fake("multiscale_roi_align")
def _fake(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_box_size: float,
    canonical_level: int,
    level_epsilon: float,
) -> Tensor:
    channels_last = all(channels_last_only(feature) for feature in features)
    return torch.empty(
        (boxes.shape[0], features[0].shape[1], pooled_height, pooled_width),
        dtype=features[0].dtype,
        device=features[0].device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


@_register.register_fake("multiscale_roi_align_backward")
def _fake_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_box_size: float,
    canonical_level: int,
    level_epsilon: float,
    batch: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    deterministic: bool,
) -> list[Tensor]:
    return [
        torch.empty(
            (batch, grad.shape[1], height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        for height, width in zip(heights, widths, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, spatial_scales, _, _, *rest = inputs
    ctx.save_for_backward(boxes)
    ctx.forward = (spatial_scales, *rest)
    ctx.batch = features[0].shape[0]
    ctx.heights = [feature.shape[2] for feature in features]
    ctx.widths = [feature.shape[3] for feature in features]
    ctx.channels_last = all(channels_last_only(feature) for feature in features)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor] | None, ...]:
    (boxes,) = ctx.saved_tensors
    grads = torch.ops.panfpn_fast.multiscale_roi_align_backward(
        grad,
        boxes,
        *ctx.forward,
        ctx.batch,
        ctx.heights,
        ctx.widths,
        ctx.channels_last,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (grads, *[None] * 9)


_register.register_autograd("multiscale_roi_align", _backward, _setup_context)
_register.block_double_backward("multiscale_roi_align")
