"""One call of each op of the semantic head that Triton implements, on arguments in the layouts of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5


def head_calls(
    height: int = 8, width: int = 12, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> dict[str, tuple[Any, ...]]:
    """Returns the arguments of the ops by name, for a finest level of height x width pixels.

    Args:
        height: Even.
        width: Even.
        dtype: Of the maps.
        device: Of the tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def map_of(channels: int, rows: int = height, columns: int = width) -> Tensor:
        return random(2, channels, rows, columns, dtype=dtype).contiguous(memory_format=torch.channels_last)

    y, logits, factor = map_of(32), map_of(12), 4
    conv_weight = random(32, 16, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    norm = (random(2, 8), random(2, 8).abs(), random(32), random(32))
    target = torch.randint(0, 12, (2, factor * height, factor * width), generator=generator).to(device)
    settings = (factor, 255, 0.0, "mean")
    log_sum_exp = random(*target.shape).abs() + 9
    total_weight = torch.tensor(float(target.numel()), device=device)
    large = (factor * height, factor * width)
    return {
        "bilinear_upsample_backward": (logits, 2),
        "conv3x3_statistics": (map_of(16), conv_weight, 8, EPS),
        "group_norm_relu_project": (
            y, *norm, random(12, 32, dtype=dtype), random(12, dtype=dtype), map_of(12, height // 2, width // 2),
        ),
        "group_norm_relu_upsample": (y, *norm, 2, map_of(32, 2 * height, 2 * width)),
        "group_norm_relu_upsample_backward": (map_of(32, 2 * height, 2 * width), y, *norm, 2),
        "group_norm_statistics": (y, 8, EPS),
        "upsample_argmax": (logits, factor, *large, *large, False),
        "upsample_cross_entropy": (logits, target, None, *settings),
        "upsample_cross_entropy_backward": (
            torch.ones((), device=device), logits, target, None, log_sum_exp, total_weight, *settings,
        ),
    }  # fmt: skip


def call(name: str, args: tuple[Any, ...]) -> Any:
    """Calls an op of the package through the dispatcher."""
    op: Callable[..., Any] = getattr(torch.ops.panfpn_fast, name)
    return op(*args)
