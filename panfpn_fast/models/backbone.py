"""ResNet (He et al. 2016) as the feature extractor under an FPN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.config import BACKBONES
from panfpn_fast.models.layers import FrozenBatchNorm2d, init_msra


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual connection.

    Args:
        in_channels: channels of the input.
        channels: channels of the 3x3 convolution; the output has four times as many.
        stride: 1, or 2 to halve the resolution.
        stride_in_1x1: the stride is in the first 1x1 convolution (Caffe) instead of in the 3x3 (torchvision).
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, stride_in_1x1: bool) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride1, bias=False)
        self.norm1 = FrozenBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride2, padding=1, bias=False)
        self.norm2 = FrozenBatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm3 = FrozenBatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.add_module("norm", FrozenBatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, 4 * channels, H / stride, W / stride]."""
        y = F.relu_(self.norm1(self.conv1(x)))
        y = F.relu_(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y = y + self.shortcut(x)
        return F.relu_(y)


class ResNet(nn.Module):
    """ResNet up to its last stage, returning every stage.

    Args:
        name: a key of :data:`panfpn_fast.models.config.BACKBONES`.
        stride_in_1x1: see :class:`Bottleneck`.
    """

    out_channels = (256, 512, 1024, 2048)

    def __init__(self, name: str, stride_in_1x1: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.norm1 = FrozenBatchNorm2d(64)
        in_channels = 64
        for stage, (blocks, out_channels) in enumerate(
            zip(BACKBONES[name], self.out_channels, strict=True), start=1
        ):
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 1 else 1
                channels = out_channels // Bottleneck.expansion
                layer.append(Bottleneck(in_channels, channels, stride, stride_in_1x1))
                in_channels = out_channels
            self.add_module(f"layer{stage}", layer)
        self.apply(init_msra)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes the features.

        Args:
            x: normalised images [N, 3, H, W]; H and W multiples of 32.

        Returns:
            C2..C5: [N, 256, H/4, W/4], [N, 512, H/8, W/8], [N, 1024, H/16, W/16], [N, 2048, H/32, W/32].
        """
        x = F.relu_(self.norm1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, padding=1)
        features = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            features.append(x)
        return features
