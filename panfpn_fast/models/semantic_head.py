"""The semantic branch (Kirillov et al. 2019, section 3), which upsamples, combines and classifies all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.models.layers import init_msra


class SemanticStage(nn.Module):
    """3x3 convolution, GroupNorm and ReLU, followed by a bilinear 2x upsampling or by a predictor.

    Args:
        in_channels: Number of input channels.
        channels: Number of output channels.
        groups: Number of groups of the GroupNorm.
    """

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, channels, 2 H, 2 W]."""
        conv, norm, prepared = self.conv.weight, self.norm, getattr(self.conv, "prepared", None)
        return ops.conv_gn_relu_upsample(
            x, conv, norm.weight, norm.bias, norm.num_groups, norm.eps, prepared=prepared
        )

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Applies a predictor [K, channels] instead of the upsampling, and adds the residual.

        Returns:
            Logits [N, K, H, W].
        """
        conv, norm, prepared = self.conv.weight, self.norm, getattr(self.conv, "prepared", None)
        return ops.conv_gn_relu_project(
            x, conv, norm.weight, norm.bias, norm.num_groups, weight, bias, norm.eps, residual, prepared
        )


class SemanticHead(nn.Module):
    """Predicts a class for every position at 1/4 of the input's resolution.

    Args:
        config: The settings of the network.
    """

    stride = 4

    def __init__(self, config: PanopticFPNConfig) -> None:
        super().__init__()
        channels, groups = config.semantic_channels, config.semantic_groups
        self.levels = nn.ModuleDict()
        for level in range(2, 6):
            stages = nn.ModuleList()
            for i in range(max(level - 2, 1)):
                stages.append(SemanticStage(channels if i else config.branch_channels, channels, groups))
            self.levels[f"p{level}"] = stages
        self.fusion = config.semantic_fusion
        predicted = channels * len(self.levels) if self.fusion == "concat" else channels
        self.logits = nn.Conv2d(predicted, config.num_stuff + 1, 1)
        self.apply(init_msra)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predicts class logits.

        The predictor is linear and the weights of an upsampling sum to one, so the predictor commutes with the
        upsampling and with the sum over levels. Here the predictor comes first: the logits of P3 to P5 are added at
        1/8 of the resolution, and only their sum is upsampled to 1/4.

        Args:
            features: P2 to P5, each [N, C, h, w] with half the height and width of the previous level; P6 may follow.

        Returns:
            Logits [N, 1 + stuff, H/4, W/4], channels-last. Channel 0 is "other", all things.
        """
        weight = self.logits.weight[:, :, 0, 0]
        # Each concatenated level uses a part of the predictor, each summed level the whole predictor.
        count = len(self.levels)
        weights = weight.chunk(count, dim=1) if self.fusion == "concat" else (weight,) * count
        logits: Tensor | None = None
        levels = list(zip(self.levels.values(), features, weights, strict=False))
        for stages, feature, of_level in reversed(levels):
            assert isinstance(stages, nn.ModuleList)
            # The convolutions are faster in channels-last, by more than the conversion takes.
            x = feature.contiguous(memory_format=torch.channels_last)
            for stage in stages[:-1]:
                x = stage(x)
            bias = self.logits.bias if logits is None else None
            logits = stages[-1].project(x, of_level, bias, logits)  # type: ignore[operator]
        assert logits is not None
        return logits

    def label(
        self, logits: Tensor, sizes: Sequence[tuple[int, int]], output_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Converts logits to label maps.

        As in detectron2, it applies two bilinear resamplings: from the logits to the padded input, which is then
        cropped to the image, and from the image to the output. A single resampling to the output would give different
        labels.

        Args:
            logits: Class logits [N, K, H/4, W/4].
            sizes: Height and width of each image without padding.
            output_sizes: Height and width of each result.

        Returns:
            The labels [H, W] of each image, uint8 (int16 above 256 classes): 0 is things, stuff starts at 1.
        """
        labels = []
        for i, (crop, size) in enumerate(zip(sizes, output_sizes, strict=True)):
            label = ops.upsample_argmax(logits[i : i + 1], self.stride, crop=crop, size=size)
            labels.append(label[0])
        return labels
