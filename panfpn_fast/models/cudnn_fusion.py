"""cuDNN's convolutions that add a bias and a tensor and apply ReLU as they store the result.

After PyTorch's own convolution on CUDA, each of the three takes a kernel. No GPU has run this module yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DEVICE_TYPE = "cuda"
"""Type of the devices with cuDNN; tests put the CPU in its place."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Convolutions for which cuDNN has no such algorithm on this GPU.
_refused: set[tuple[Any, ...]] = set()


def has_cudnn(x: Tensor) -> bool:
    """Whether cuDNN may compute fused convolutions of `x`.

    PyTorch lets cuDNN choose among all algorithms for them, so they are not used where deterministic ones are required.
    """
    return (
        x.dtype in _DTYPES
        and bool(torch.backends.cudnn.enabled)
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.is_autocast_enabled(DEVICE_TYPE)
    )


def convolve_relu(conv: nn.Conv2d, x: Tensor, added: Tensor | None) -> Tensor | None:
    """Applies a convolution, adds its bias and a tensor, and applies ReLU.

    Args:
        conv: A convolution with a bias, on the device of `x` and in its dtype.
        x: Input of the convolution, [N, C, H, W].
        added: Tensor to add, in the shape of the result, or None.

    Returns:
        [N, K, H', W'], or None if cuDNN has no algorithm for this convolution. It is not asked for such a one again.
    """
    if conv.bias is None:
        return None
    where = (conv.stride, conv.padding, conv.dilation, conv.groups)
    case = (x.device, x.dtype, conv.weight.shape, *where, added is None)
    if case in _refused:
        return None
    try:
        if added is None:
            found: Tensor = torch.ops.aten.cudnn_convolution_relu(x, conv.weight, conv.bias, *where)
        else:
            found = torch.ops.aten.cudnn_convolution_add_relu(x, conv.weight, added, 1.0, conv.bias, *where)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what else is wrong, PyTorch's convolution will report
        _refused.add(case)
        return None
    return found
