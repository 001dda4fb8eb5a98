"""Backbones with high-resolution features, which the paper compares with an FPN in figure 5.

- Dilated (Yu and Koltun 2016; DeepLab): the last stages keep the resolution and dilate their 3x3 convolutions instead.
- Symmetric decoder (U-Net; Newell et al. 2016): a decoder repeats the stages of the ResNet in reverse. Each decoder
  stage has the depth, resolution and width of the stage that it mirrors, and adds the features of that stage to the
  upsampled output of the previous decoder stage.

All use this package's ResNet, so that they differ in nothing else.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.backbone import Bottleneck, ResNet
from panfpn_fast.models.config import BACKBONES
from panfpn_fast.models.fpn import FPN

_FPN_CHANNELS = 256


class FPNBackbone(nn.Module):
    """ResNet and FPN.

    Args:
        name: Name of the ResNet.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.resnet = ResNet(name, stride_in_1x1=False)
        self.fpn = FPN(self.resnet.out_channels, _FPN_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Returns P2 [N, 256, H / 4, W / 4], the finest map."""
        return self.fpn(self.resnet(x))[0]


class DilatedBackbone(nn.Module):
    """ResNet whose last stages use dilation instead of stride.

    Args:
        name: Name of the ResNet.
        output_stride: 16 to dilate the last stage, 8 to dilate the last two.

    Note:
        As with torchvision's `replace_stride_with_dilation`, the first block of a stage has the dilation of the
        previous stage.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        self.resnet = ResNet(name, stride_in_1x1=False)
        dilation = 1
        for stage in (3, 4) if output_stride == 8 else (4,):
            layer = self.resnet.get_submodule(f"layer{stage}")
            for i, block in enumerate(layer.children()):
                assert isinstance(block, Bottleneck)
                if i == 0:
                    block.conv2.stride = (1, 1)
                    shortcut = block.shortcut.get_submodule("conv")
                    assert isinstance(shortcut, nn.Conv2d)
                    shortcut.stride = (1, 1)
                of_block = dilation if i == 0 else 2 * dilation
                block.conv2.dilation = block.conv2.padding = (of_block, of_block)
            dilation *= 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns C5 [N, 2048, H / output_stride, W / output_stride]."""
        return self.resnet(x)[-1]


class SymmetricBackbone(nn.Module):
    """ResNet and a decoder that mirrors its stages.

    Args:
        name: Name of the ResNet.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.resnet = ResNet(name, stride_in_1x1=False)
        self.narrow = nn.ModuleList()
        self.stages = nn.ModuleList()
        channels = self.resnet.out_channels
        for stage in (2, 1, 0):
            self.narrow.append(nn.Conv2d(channels[stage + 1], channels[stage], 1))
            blocks = BACKBONES[name].blocks[stage]
            width = channels[stage] // Bottleneck.expansion
            self.stages.append(
                nn.Sequential(*(Bottleneck(channels[stage], width, 1, False) for _ in range(blocks)))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, 256, H / 4, W / 4]."""
        *finer, x = self.resnet(x)
        for narrow, stage, lateral in zip(self.narrow, self.stages, reversed(finer), strict=True):
            x = F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = stage(x + lateral)
        return x
