"""Feature pyramid network (Lin et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.conv_fusion import conv2d
from panfpn_fast.models.layers import init_xavier


class FPN(nn.Module):
    """Adds coarse, semantically strong features to fine ones for P2 to P5, and subsamples P5 for P6.

    Args:
        in_channels: Numbers of channels of C2 to C5.
        channels: Number of channels of every output.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleDict()
        self.output = nn.ModuleDict()
        for level, c in enumerate(in_channels, start=2):
            self.lateral[f"p{level}"] = nn.Conv2d(c, channels, 1)
            self.output[f"p{level}"] = nn.Conv2d(channels, channels, 3, padding=1)
        self.apply(init_xavier)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Computes the pyramid.

        Args:
            features: C2 to C5, each with half the height and width of the previous level.

        Returns:
            P2 to P6, each [N, channels, h, w], at strides 4, 8, 16, 32 and 64.
        """
        merged: Tensor | None = None
        outputs: list[Tensor] = []
        for name, c in reversed(list(zip(self.lateral, features, strict=True))):
            above = None if merged is None else F.interpolate(merged, scale_factor=2.0, mode="nearest")
            merged = conv2d(self.lateral[name], c, added=above)
            outputs.insert(0, conv2d(self.output[name], merged))
        outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs
