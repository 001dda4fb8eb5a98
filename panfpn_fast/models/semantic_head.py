"""The semantic branch (Kirillov et al. 2019, section 3): every level brought to 1/4, combined, classified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.models.layers import init_msra


class SemanticStage(nn.Module):
    """3x3 convolution, GroupNorm and ReLU; then a bilinear 2x upsampling, or a predictor.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        groups: groups of the GroupNorm.
    """

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, channels, 2 H, 2 W]."""
        conv, norm = self.conv.weight, self.norm
        return ops.conv_gn_relu_upsample(x, conv, norm.weight, norm.bias, norm.num_groups, norm.eps)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Applies a predictor [K, channels] in place of the upsampling, and adds the residual.

        Returns:
            [N, K, H, W]
        """
        conv, norm = self.conv.weight, self.norm
        return ops.conv_gn_relu_project(
            x, conv, norm.weight, norm.bias, norm.num_groups, weight, bias, norm.eps, residual
        )


class SemanticHead(nn.Module):
    """Predicts a class for every position at 1/4 of the input's resolution.

    Args:
        config: the network's settings.
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

        The predictor is linear and an upsampling's weights sum to one, so the order of the two, and of the
        predictor and the sum over levels, makes no difference. Here the predictor comes first: what is added
        and upsampled are the logits, P3 to P5's at 1/8 and only their sum to 1/4.

        Args:
            features: P2..P5 (P6 may follow), each [N, C, h, w], and each half as high and wide as the one before.

        Returns:
            [N, 1 + stuff, H/4, W/4], channels-last; channel 0 is "other": all things.
        """
        weight = self.logits.weight[:, :, 0, 0]
        # Concatenated levels have a part of the predictor each, summed ones all of it.
        count = len(self.levels)
        weights = weight.chunk(count, dim=1) if self.fusion == "concat" else (weight,) * count
        logits: Tensor | None = None
        levels = list(zip(self.levels.values(), features, weights, strict=False))
        for stages, feature, of_level in reversed(levels):
            assert isinstance(stages, nn.ModuleList)
            # The convolutions are fastest so, by more than the change of layout takes.
            x = feature.contiguous(memory_format=torch.channels_last)
            for stage in stages[:-1]:
                x = stage(x)
            bias = self.logits.bias if logits is None else None
            logits = stages[-1].project(x, of_level, bias, logits)  # type: ignore[operator]
        assert logits is not None
        return logits

    def loss(self, logits: Tensor, targets: Tensor, ignore_index: int = 255) -> Tensor:
        """Returns the mean cross-entropy over the pixels of the input, as detectron2 has it.

        Args:
            logits: [N, K, H/4, W/4].
            targets: [N, H, W], integers: the class of each pixel, or ``ignore_index``.
            ignore_index: marks pixels that do not count; where none does, the loss is NaN.

        Returns:
            A scalar, at least float32.
        """
        return ops.upsample_cross_entropy(logits, targets, self.stride, ignore_index)

    def label(
        self, logits: Tensor, sizes: Sequence[tuple[int, int]], output_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Turns logits into label maps.

        Two bilinear resamplings, one after the other as detectron2 does them: to the padded input, from
        which the padding is cut off, and from the image to the output. One resampling straight to the
        output would be another function.

        Args:
            logits: [N, K, H/4, W/4].
            sizes: each image's height and width without padding.
            output_sizes: the height and width wanted for each.

        Returns:
            Per image [H, W], uint8 (int16 above 256 classes): 0 = things, 1.. = stuff.
        """
        labels = []
        for i, (crop, size) in enumerate(zip(sizes, output_sizes, strict=True)):
            label = ops.upsample_argmax(logits[i : i + 1], self.stride, crop=crop, size=size)
            labels.append(label[0])
        return labels
