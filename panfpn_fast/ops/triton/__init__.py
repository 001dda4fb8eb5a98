"""CUDA implementations of the semantic head's ops: Triton kernels with their host functions.

`panfpn_fast.ops._register` imports this package at the first call with a CUDA tensor. The tests import it on any
machine; without a GPU, Triton's interpreter runs the kernels on the CPU.
"""

from __future__ import annotations

from typing import Any

from panfpn_fast.ops.triton import (
    _planar,
    bilinear_upsample_backward,
    conv3x3_statistics,
    group_norm_relu_project,
    group_norm_relu_upsample,
    group_norm_statistics,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_backward,
)
from panfpn_fast.ops.triton._launch import kernels_of
from panfpn_fast.ops.triton._plan import Planned

IMPLEMENTATIONS = {
    "bilinear_upsample_backward": Planned(bilinear_upsample_backward.bilinear_upsample_backward),
    "conv3x3_statistics": Planned(conv3x3_statistics.conv3x3_statistics, conv3x3_statistics.settings),
    "group_norm_relu_project": Planned(
        group_norm_relu_project.group_norm_relu_project, group_norm_relu_project.precision
    ),
    "group_norm_relu_upsample": Planned(group_norm_relu_upsample.group_norm_relu_upsample),
    "group_norm_relu_upsample_backward": Planned(group_norm_relu_upsample.group_norm_relu_upsample_backward),
    "group_norm_statistics": Planned(group_norm_statistics.group_norm_statistics),
    "upsample_argmax": Planned(upsample_argmax.upsample_argmax),
    "upsample_cross_entropy": Planned(upsample_cross_entropy.upsample_cross_entropy),
    "upsample_cross_entropy_backward": Planned(
        upsample_cross_entropy_backward.upsample_cross_entropy_backward
    ),
}
"""The implementations by the name of their op in `panfpn_fast`."""

KERNELS: list[Any] = [
    kernel
    for module in (
        _planar,
        bilinear_upsample_backward,
        conv3x3_statistics,
        group_norm_relu_project,
        group_norm_relu_upsample,
        group_norm_statistics,
        upsample_argmax,
        upsample_cross_entropy,
        upsample_cross_entropy_backward,
    )
    for kernel in kernels_of(module)
]
"""The kernels that the host functions launch."""
