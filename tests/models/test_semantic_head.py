"""The semantic head compared with a float64 implementation in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.semantic_head import SemanticHead

Array = npt.NDArray[np.float64]


def _resize_matrix(new: int, old: int) -> Array:
    """Makes the matrix [new, old] of a bilinear interpolation without aligned corners."""
    matrix = np.zeros((new, old))
    for i in range(new):
        position = max((i + 0.5) * old / new - 0.5, 0)
        low = int(position)
        high = min(low + 1, old - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix


def _resize(x: Array, height: int, width: int) -> Array:
    resized: Array = _resize_matrix(height, x.shape[-2]) @ x @ _resize_matrix(width, x.shape[-1]).T
    return resized


def _conv3x3(x: Array, weight: Array) -> Array:
    height, width = x.shape[-2:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((weight.shape[0], height, width))
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + height, dx : dx + width]
            out += np.einsum("oc,chw->ohw", weight[:, :, dy, dx], shifted)
    return out


def _group_norm(x: Array, groups: int, weight: Array, bias: Array) -> Array:
    grouped = x.reshape(groups, -1)
    grouped = grouped - grouped.mean(axis=1, keepdims=True)
    grouped = grouped / np.sqrt((grouped**2).mean(axis=1, keepdims=True) + 1e-5)
    normalised: Array = grouped.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return normalised


def _derive(weights: dict[str, Any], features: list[Array], groups: int) -> Array:
    total = np.zeros(())
    for level, x in enumerate(features, start=2):
        for stage in range(max(level - 2, 1)):
            name = f"levels.p{level}.{stage}"
            x = _conv3x3(x, weights[f"{name}.conv.weight"])
            x = _group_norm(x, groups, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
            x = np.maximum(x, 0)
            if level > 2:
                x = _resize(x, 2 * x.shape[-2], 2 * x.shape[-1])
        total = total + x
    weight, bias = weights["logits.weight"][:, :, 0, 0], weights["logits.bias"]
    return np.asarray(np.einsum("oc,chw->ohw", weight, total) + bias[:, None, None])


@pytest.fixture
def head() -> SemanticHead:
    torch.manual_seed(0)
    config = PanopticFPNConfig(fpn_channels=6, semantic_channels=8, semantic_groups=4, num_stuff=4)
    head = SemanticHead(config).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_labels_equal_the_numpy_implementation(head: SemanticHead, dtype: torch.dtype) -> None:
    head = head.to(dtype)
    features = [torch.randn(2, 6, 24 // 2**i, 32 // 2**i, dtype=dtype) for i in range(5)]
    sizes, output_sizes = [(93, 101), (96, 128)], [(57, 211), (96, 128)]
    with torch.no_grad():
        logits = head(features)
        labels = head.label(logits, sizes, output_sizes)
    weights = {name: value.double().numpy() for name, value in head.state_dict().items()}
    for i in range(2):
        expected = _derive(weights, [f[i].double().numpy() for f in features[:4]], groups=4)
        # In float32, three convolutions with GroupNorm in between; values are about 10.
        tolerance = 2e-4 if dtype == torch.float32 else 1e-9
        np.testing.assert_allclose(logits[i].double().numpy(), expected, atol=tolerance, rtol=0)
        full = _resize(expected, 96, 128)[:, : sizes[i][0], : sizes[i][1]]
        resized = _resize(full, *output_sizes[i])
        assert labels[i].dtype == torch.uint8
        got = labels[i].numpy()
        # If the two best classes differ by less than the rounding error, either one is correct.
        best = np.take_along_axis(resized, got[None].astype(np.int64), axis=0)[0]
        assert (best >= resized.max(axis=0) - 2 * tolerance).all()
        assert (got == resized.argmax(axis=0)).mean() > 0.999


def test_stages_per_level(head: SemanticHead) -> None:
    stages = {name: len(level) for name, level in head.levels.items()}  # type: ignore[arg-type]
    assert stages == {"p2": 1, "p3": 1, "p4": 2, "p5": 3}
    assert not any(name.endswith("conv.bias") for name in head.state_dict())


def test_many_classes_need_a_wider_type() -> None:
    head = SemanticHead(PanopticFPNConfig(fpn_channels=4, semantic_channels=32, num_stuff=299))
    logits = torch.zeros(1, 300, 8, 8)
    logits[:, 299] = 1
    [labels] = head.label(logits, [(32, 32)], [(5, 9)])
    assert labels.dtype == torch.int16
    assert torch.equal(labels, torch.full((5, 9), 299, dtype=torch.int16))


def _plain(head: SemanticHead, features: list[Tensor]) -> Tensor:
    """Computes the head as in the paper: every level is upsampled to 1/4, then all are combined and classified."""
    maps = []
    for level, stages in enumerate(head.levels.values()):
        x = features[level]
        for stage in stages:  # type: ignore[attr-defined]
            norm = stage.norm
            x = F.conv2d(x, stage.conv.weight, padding=1)
            x = F.relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        maps.append(x)
    combined = torch.cat(maps, dim=1) if head.fusion == "concat" else torch.stack(maps).sum(0)
    return F.conv2d(combined, head.logits.weight, head.logits.bias)


@pytest.mark.parametrize("fusion", ["sum", "concat"])
@pytest.mark.parametrize("size", [(24, 40), (8, 8), (40, 56)])
def test_commuted_equals_plain_including_gradients(fusion: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = PanopticFPNConfig(
        fpn_channels=6, semantic_channels=8, semantic_groups=4, num_stuff=4, semantic_fusion=fusion
    )
    head = SemanticHead(config).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    features = [
        torch.randn(2, 6, size[0] >> i, size[1] >> i, dtype=torch.float64, requires_grad=True)
        for i in range(4)
    ]
    commuted, plain = head(features), _plain(head, features)
    # The same terms in a different order: a few hundred roundings of values up to 1000.
    torch.testing.assert_close(commuted, plain, atol=1e-10, rtol=1e-11)
    weights = torch.randn_like(plain)
    leaves = [*features, *head.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(commuted, leaves, weights),
        torch.autograd.grad(plain, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-9)
