"""ResNet (He et al. 2016) and ResNeXt (Xie et al. 2017) as the feature extractor under an FPN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.config import BACKBONES
from panfpn_fast.models.conv_fusion import conv_norm
from panfpn_fast.models.layers import init_msra, make_norm


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Module:
    """Makes the identity, or a 1x1 convolution and a normalisation if the shapes differ."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    shortcut = nn.Sequential()
    shortcut.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
    shortcut.add_module("norm", make_norm(norm, out_channels))
    return shortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        stride: 1, or 2 to halve the resolution.
        norm: Kind of normalisation, see `make_norm`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, channels)
        self.shortcut = _shortcut(in_channels, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, channels, H / stride, W / stride]."""
        y = conv_norm(self.conv1, self.norm1, x, relu=True)
        return conv_norm(self.conv2, self.norm2, y, relu=True, added=self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual connection.

    Args:
        in_channels: Number of input channels.
        channels: A quarter of the number of output channels, and without groups the width of the 3x3 convolution.
        stride: 1, or 2 to halve the resolution.
        stride_in_1x1: Whether the first 1x1 convolution has the stride (Caffe) instead of the 3x3 (torchvision).
        norm: Kind of normalisation, see `make_norm`.
        groups: Number of groups of the 3x3 convolution.
        group_width: Channels per group for every 64 of `channels`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        stride_in_1x1: bool,
        norm: str = "frozen_bn",
        groups: int = 1,
        group_width: int = 64,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        width = channels * group_width // 64 * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride1, bias=False)
        self.norm1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride2, padding=1, groups=groups, bias=False)
        self.norm2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = make_norm(norm, out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, 4 * channels, H / stride, W / stride]."""
        y = conv_norm(self.conv1, self.norm1, x, relu=True)
        y = conv_norm(self.conv2, self.norm2, y, relu=True)
        return conv_norm(self.conv3, self.norm3, y, relu=True, added=self.shortcut(x))


class ResNet(nn.Module):
    """ResNet without its classifier; returns the features of every stage.

    Args:
        name: A key of `panfpn_fast.models.config.BACKBONES`.
        stride_in_1x1: Whether a bottleneck has its stride in the first 1x1 convolution, see `Bottleneck`.
        norm: Kind of normalisation, see `make_norm`.

    Attributes:
        out_channels: Numbers of channels of C2 to C5.
    """

    def __init__(self, name: str, stride_in_1x1: bool, norm: str = "frozen_bn") -> None:
        super().__init__()
        layout = BACKBONES[name]
        self.conv1 = nn.Conv2d(3, layout.width, 7, 2, padding=3, bias=False)
        self.norm1 = make_norm(norm, layout.width)
        in_channels = layout.width
        self.out_channels: list[int] = []
        for stage, blocks in enumerate(layout.blocks):
            channels = layout.width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                if layout.bottleneck:
                    grouped = (layout.groups, layout.group_width)
                    layer.append(Bottleneck(in_channels, channels, stride, stride_in_1x1, norm, *grouped))
                    in_channels = channels * Bottleneck.expansion
                else:
                    layer.append(BasicBlock(in_channels, channels, stride, norm))
                    in_channels = channels
            self.add_module(f"layer{stage + 1}", layer)
            self.out_channels.append(in_channels)
        self.apply(init_msra)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes the features.

        Args:
            x: Normalised images [N, 3, H, W]; H and W are multiples of 32.

        Returns:
            C2 to C5 at strides 4, 8, 16 and 32. A ResNet-50 returns [N, 256, H/4, W/4] to [N, 2048, H/32, W/32].
        """
        x = conv_norm(self.conv1, self.norm1, x, relu=True)
        x = F.max_pool2d(x, 3, 2, padding=1)
        features = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            features.append(x)
        return features
