"""The ops: detection and panoptic segmentation primitives for CPU and CUDA.

Each op is a function here and has a reference in plain PyTorch in `ops.reference`. It calls one or more dispatcher ops
`torch.ops.panfpn_fast.<op>`, whose implementations are C++ on the CPU and C++/CUDA or Triton on CUDA.
"""

from __future__ import annotations

from panfpn_fast.ops._winograd import winograd
from panfpn_fast.ops.batched_nms import batched_nms
from panfpn_fast.ops.conv3x3 import conv3x3
from panfpn_fast.ops.conv_gn_relu_project import conv_gn_relu_project
from panfpn_fast.ops.conv_gn_relu_upsample import conv_gn_relu_upsample
from panfpn_fast.ops.group_norm_relu_upsample import group_norm_relu_upsample
from panfpn_fast.ops.multiscale_roi_align import multiscale_roi_align
from panfpn_fast.ops.nms import nms
from panfpn_fast.ops.nms_padded import nms_padded
from panfpn_fast.ops.panoptic_merge import PanopticSegments, panoptic_merge
from panfpn_fast.ops.panoptic_merge_padded import panoptic_merge_padded
from panfpn_fast.ops.paste_masks import paste_masks
from panfpn_fast.ops.paste_masks_rle import paste_masks_rle
from panfpn_fast.ops.roi_align import roi_align
from panfpn_fast.ops.upsample_argmax import upsample_argmax
from panfpn_fast.ops.upsample_cross_entropy import upsample_cross_entropy

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
    "winograd",
]
