"""Gradients of the RoIAligns as users get them. Other op tests ask for deterministic algorithms, a second path.

On CUDA the default path adds with atomics, four channels at a time where they allow it, and converts to half types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.ops import reference
from support.op_checks import Tolerance, assert_agrees, averaging_tolerance
from support.op_samples import DEGENERATE_BOXES, random_features, random_rois
from support.poison import default_algorithms

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Channels that fill no pack of four, one pack in a few lanes, and more packs than a warp has lanes.
CHANNELS = [5, 8, 132]


def boxes(height: int, width: int, device: torch.device) -> Tensor:
    degenerate = torch.cat([torch.zeros(len(DEGENERATE_BOXES), 1), DEGENERATE_BOXES], dim=1)
    rows = [random_rois(11, 2, (height, width), 1), degenerate, torch.full((1, 5), 7.0)]
    return torch.cat(rows).to(device)


def gradients(function: Callable[..., Tensor], levels: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of a random linear function of the result."""
    leaves = [level.detach().clone().requires_grad_() for level in levels]
    out = function(leaves[0] if function.__name__ == "roi_align" else leaves, *args)
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(out, leaves, weights.to(out))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["roi_align", "multiscale_roi_align"])
def test_default_gradient(
    name: str, dtype: torch.dtype, layout: torch.memory_format, channels: int, device: torch.device
) -> None:
    args: tuple[Any, ...]
    if name == "roi_align":
        sizes, args = [(13, 17)], (boxes(52, 68, device), (3, 2), 0.25, 0, True)
    else:
        sizes, args = [(26, 34), (13, 17)], (boxes(104, 136, device), (3, 2), (0.25, 0.125))
    levels = [
        random_features((2, channels, *size), i).to(device, dtype).contiguous(memory_format=layout)
        for i, size in enumerate(sizes)
    ]
    expected = gradients(getattr(reference, name), levels, *args)
    with default_algorithms(device):
        assert not torch.are_deterministic_algorithms_enabled()
        actual = gradients(getattr(ops, name), levels, *args)
    for gradient in actual:
        assert gradient.is_contiguous(memory_format=layout)
    # Half types are rounded once, from sums in another order.
    tolerance = averaging_tolerance(dtype)
    tolerance = Tolerance(tolerance.reason, 1e-4, max(tolerance.relative, 1e-4))
    assert_agrees(actual, expected, tolerance, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_default_gradient_of_a_view(layout: torch.memory_format, device: torch.device) -> None:
    """A gradient that starts at an address which no 16-byte access can read."""
    rois = boxes(52, 68, device)
    features = random_features((2, 8, 13, 17), 0).to(device).contiguous(memory_format=layout)
    shape = (len(rois), 8, 3, 2)
    count = len(rois) * 8 * 3 * 2
    grad = random_features((count + 1,), 2).to(device)[1:].view(len(rois), 3, 2, 8).permute(0, 3, 1, 2)
    assert grad.shape == shape
    assert grad.data_ptr() % 16 == 4
    found = []
    with default_algorithms(device):
        for function in (ops.roi_align, reference.roi_align):
            leaf = features.clone().requires_grad_()
            found.append(torch.autograd.grad(function(leaf, rois, (3, 2), 0.25, 2, True), leaf, grad)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
