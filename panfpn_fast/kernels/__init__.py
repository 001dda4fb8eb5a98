"""The semantic head's ops as Triton kernels, in the dispatcher namespace panfpn_fast_triton.

Importing the package imports Triton and registers the ops. `panfpn_fast._load` does so where there is a GPU; the tests
do so anywhere, and then Triton's interpreter runs the kernels on the CPU.
"""

from __future__ import annotations

from panfpn_fast.kernels import (
    bilinear_upsample_backward,
    conv3x3_statistics,
    group_norm_relu_project,
    group_norm_relu_upsample,
    group_norm_statistics,
    upsample_argmax,
    upsample_cross_entropy,
)

__all__ = [
    "bilinear_upsample_backward",
    "conv3x3_statistics",
    "group_norm_relu_project",
    "group_norm_relu_upsample",
    "group_norm_statistics",
    "upsample_argmax",
    "upsample_cross_entropy",
]
