"""ResNet and FPN: shapes, sizes and the position of the stride."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from panfpn_fast.models.backbone import Bottleneck, ResNet
from panfpn_fast.models.fpn import FPN
from panfpn_fast.models.layers import FrozenBatchNorm2d, make_norm


@pytest.mark.parametrize(
    ("name", "parameters"),
    # torchvision's documented counts (25,557,032, 44,549,160, 60,192,808; 25,028,904, 88,791,336) minus the
    # classifier's 2,049,000 and the batch norms' 53,120, 105,344, 151,424; 68,224, 202,880.
    [
        ("resnet50", 23_454_912),
        ("resnet101", 42_394_816),
        ("resnet152", 57_992_384),
        ("resnext50_32x4d", 22_911_680),
        ("resnext101_32x8d", 86_539_456),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(name, True).parameters()) == parameters


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_shapes_and_strides(stride_in_1x1: bool) -> None:
    with torch.device("meta"):
        features = ResNet("resnet50", stride_in_1x1)(torch.empty(2, 3, 96, 160))
    assert [list(f.shape) for f in features] == [
        [2, 256, 24, 40],
        [2, 512, 12, 20],
        [2, 1024, 6, 10],
        [2, 2048, 3, 5],
    ]


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_position_of_the_stride(stride_in_1x1: bool) -> None:
    block = Bottleneck(64, 32, 2, stride_in_1x1)
    strides = {name: m.stride[0] for name, m in block.named_modules() if isinstance(m, nn.Conv2d)}
    assert strides == {
        "conv1": 2 if stride_in_1x1 else 1,
        "conv2": 1 if stride_in_1x1 else 2,
        "conv3": 1,
        "shortcut.conv": 2,
    }


def test_groups_of_a_resnext_use_only_their_channels() -> None:
    block = Bottleneck(64, 64, 1, False, groups=32, group_width=4)
    assert block.conv2.weight.shape == (128, 4, 3, 3)
    x = torch.zeros(1, 128, 3, 3)
    x[:, 4:8] = 1
    assert block.conv2(x).abs().amax((0, 2, 3)).nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    with torch.device("meta"):
        features = ResNet("resnext50_32x4d", False)(torch.empty(1, 3, 64, 64))
    assert [f.shape[1] for f in features] == [256, 512, 1024, 2048]


@pytest.mark.parametrize("channels", [1, 8, 20, 64, 440, 2048])
def test_group_norm_for_any_number_of_channels(channels: int) -> None:
    norm = make_norm("gn", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == {1: 1, 8: 1, 20: 2, 64: 8, 440: 22, 2048: 32}[channels]


def test_frozen_batch_norm_follows_its_formula() -> None:
    norm = FrozenBatchNorm2d(5).double()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    expected = (x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm.train()(x), expected)
    assert not list(norm.parameters())
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_fpn_adds_from_coarse_to_fine() -> None:
    fpn = FPN((1, 1, 1, 1), 1).double()
    with torch.no_grad():
        for name, conv in fpn.named_modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.zero_()
                conv.weight[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
                assert conv.bias is not None
                conv.bias.fill_(0.5 if "output" in name else 0)
    c = [torch.randn(1, 1, 32 // 2**i, 64 // 2**i, dtype=torch.float64) for i in range(4)]
    p = fpn(c)
    assert [list(x.shape[2:]) for x in p] == [[32, 64], [16, 32], [8, 16], [4, 8], [2, 4]]
    expected = c[3]
    for level in (2, 1, 0):
        expected = c[level] + expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(p[level], expected + 0.5)
    torch.testing.assert_close(p[3], c[3] + 0.5)
    torch.testing.assert_close(p[4], p[3][:, :, ::2, ::2])
