"""The semantic branch (Kirillov et al. 2019, section 3): every level brought to 1/4, summed, classified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.config import PanopticFPNConfig
from panfpn_fast.models.layers import init_msra


class SemanticStage(nn.Module):
    """3x3 convolution, GroupNorm, ReLU and, on all levels but the finest, a bilinear 2x upsampling.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        groups: groups of the GroupNorm.
        upsample: whether the output has twice the height and width.
    """

    def __init__(self, in_channels: int, channels: int, groups: int, upsample: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, channels, H, W], or twice that height and width."""
        x = F.relu_(self.norm(self.conv(x)))
        return _upsample(x, 2) if self.upsample else x


# Logits at the output's size that exist at once: 256 MiB in float32.
_GROUP_VALUES = 64 << 20


def _upsample(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


class SemanticHead(nn.Module):
    """Predicts a class for every position at 1/4 of the input's resolution.

    Args:
        config: the network's settings.
    """

    stride = 4

    def __init__(self, config: PanopticFPNConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleDict()
        for level in range(2, 6):
            stages = nn.Sequential()
            for i in range(max(level - 2, 1)):
                in_channels = config.semantic_channels if i else config.fpn_channels
                stages.append(
                    SemanticStage(in_channels, config.semantic_channels, config.semantic_groups, level > 2)
                )
            self.levels[f"p{level}"] = stages
        self.logits = nn.Conv2d(config.semantic_channels, config.num_stuff + 1, 1)
        self.apply(init_msra)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Predicts class logits.

        Args:
            features: P2..P5 (P6 may follow), each [N, C, h, w].

        Returns:
            [N, 1 + stuff, H/4, W/4]; channel 0 is "other": all things.
        """
        total: Tensor | None = None
        for level, feature in zip(self.levels.values(), features, strict=False):
            x: Tensor = level(feature)
            total = x if total is None else total + x
        logits: Tensor = self.logits(total)
        return logits

    def label(
        self, logits: Tensor, sizes: Sequence[tuple[int, int]], output_sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Turns logits into label maps.

        Two bilinear resamplings, one after the other as detectron2 does them: to the padded input, from
        which the padding is cut off, and from the image to the output. One resampling straight to the
        output would be another function.

        Args:
            logits: [N, C, H/4, W/4].
            sizes: each image's height and width without padding.
            output_sizes: the height and width wanted for each.

        Returns:
            Per image [H, W], uint8 (int16 above 256 classes): 0 = things, 1.. = stuff.
        """
        dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int16
        labels = []
        for i, ((height, width), output_size) in enumerate(zip(sizes, output_sizes, strict=True)):
            # All classes at the size of a photograph would be the network's largest tensor by far, so they come in
            # groups; the first of equal classes wins, as in one arg max.
            pixels = max(output_size[0] * output_size[1], height * width)
            best: Tensor | None = None
            label: Tensor | None = None
            first = 0
            for group in logits[i : i + 1].split(max(1, _GROUP_VALUES // pixels), dim=1):
                x = _upsample(group, self.stride)[..., :height, :width]
                x = F.interpolate(x, size=output_size, mode="bilinear", align_corners=False)
                value, index = x[0].max(dim=0)
                index = (index + first).to(dtype)
                if best is None or label is None:
                    best, label = value, index
                else:
                    label = torch.where(value > best, index, label)
                    best = torch.maximum(best, value)
                first += group.shape[1]
            assert label is not None
            labels.append(label)
        return labels
