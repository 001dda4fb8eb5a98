"""Reference implementations of the native ops in plain PyTorch: slow, simple and exact.

Tests compare the native ops with them, benchmarks measure against them, and devices without a native kernel
fall back to them. Each function has the signature of its public op. The public functions check the arguments.
"""

from __future__ import annotations

from panfpn_fast.ops._segments import PanopticSegments
from panfpn_fast.ops.reference.batched_nms import batched_nms
from panfpn_fast.ops.reference.conv3x3 import conv3x3
from panfpn_fast.ops.reference.conv_gn_relu_project import conv_gn_relu_project
from panfpn_fast.ops.reference.conv_gn_relu_upsample import conv_gn_relu_upsample
from panfpn_fast.ops.reference.group_norm_relu_upsample import group_norm_relu_upsample
from panfpn_fast.ops.reference.multiscale_roi_align import multiscale_roi_align
from panfpn_fast.ops.reference.nms import nms
from panfpn_fast.ops.reference.nms_padded import nms_padded
from panfpn_fast.ops.reference.panoptic_merge import panoptic_merge
from panfpn_fast.ops.reference.panoptic_merge_padded import panoptic_merge_padded
from panfpn_fast.ops.reference.paste_masks import paste_masks
from panfpn_fast.ops.reference.paste_masks_rle import paste_masks_rle
from panfpn_fast.ops.reference.roi_align import roi_align
from panfpn_fast.ops.reference.upsample_argmax import upsample_argmax
from panfpn_fast.ops.reference.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "PanopticSegments",
    "batched_nms",
    "conv3x3",
    "conv_gn_relu_project",
    "conv_gn_relu_upsample",
    "group_norm_relu_upsample",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "panoptic_merge",
    "panoptic_merge_padded",
    "paste_masks",
    "paste_masks_rle",
    "roi_align",
    "upsample_argmax",
    "upsample_cross_entropy",
]
