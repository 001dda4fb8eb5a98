"""3x3 convolution with the operations that follow it in a residual network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """Applies a 3x3 convolution with stride 1 and padding 1, adds a residual and applies ReLU.

    Differentiable in `x`, `weight`, `bias` and `residual`.

    Args:
        x: Feature map [N, C, H, W].
        weight: [K, C, 3, 3].
        bias: [K] or None.
        relu: Whether to apply ReLU at the end.
        residual: [N, K, H, W], added before the ReLU, or None.
        prepared: Ignored.

    Returns:
        [N, K, H, W] in the dtype of the convolution's result.
    """
    y = F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y
