"""Memory layouts of feature maps [N, C, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last_only(x: Tensor) -> bool:
    """Whether a feature map is contiguous in channels-last order but not in NCHW order."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Returns the layout of an op's output for an input: channels-last if `channels_last_only`, otherwise NCHW."""
    return torch.channels_last if channels_last_only(x) else torch.contiguous_format


def triton_memory_format_of(x: Tensor) -> torch.memory_format:
    """Like `memory_format_of`, for ops whose Triton implementation on CUDA always returns channels-last maps."""
    return torch.channels_last if x.device.type == "cuda" else memory_format_of(x)
