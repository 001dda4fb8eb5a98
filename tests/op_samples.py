"""Random inputs for the op tests: made on the CPU from a seed, so that every device gets the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

# Boxes that no op may read out of bounds, hang or fail on.
DEGENERATE_BOXES = torch.tensor(
    [
        [float("nan"), 1.0, 5.0, 6.0],
        [1.0, 1.0, float("inf"), 6.0],
        [float("-inf"), float("-inf"), float("inf"), float("inf")],
        [1.0, 1.0, 5.0, float("-inf")],
        [-1e30, -1e30, 1e30, 1e30],
        [3e38, -3e38, -3e38, 3e38],
        [-3e38, -3e38, 3e38, 3e38],
        [1e9, 1e9, 1e9 + 64.0, 1e9 + 64.0],
        [3.0, 4.0, 3.0, 9.0],
        [3.0, 4.0, 3.0, 4.0],
        [9.0, 8.0, 2.0, 1.0],
        [-50.0, -60.0, -20.0, -10.0],
    ]
)


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, size: Sequence[float], seed: int) -> Tensor:
    """Boxes [count, 4] whose centres lie in an image of `size` (height, width), of all sizes up to the image's."""
    random = generator(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    centre = torch.rand(count, 2, generator=random) * extent
    side = torch.rand(count, 2, generator=random) * extent
    return torch.cat([centre - side / 2, centre + side / 2], dim=1)


def random_rois(count: int, images: int, size: Sequence[float], seed: int) -> Tensor:
    """Rows of (image, x1, y1, x2, y2), [count, 5]."""
    image = torch.randint(0, max(images, 1), (count, 1), generator=generator(seed))
    return torch.cat([image.float(), random_boxes(count, size, seed)], dim=1)


def random_features(shape: Sequence[int], seed: int) -> Tensor:
    """Feature maps of values of order one."""
    return torch.randn(*shape, generator=generator(seed))


def random_masks(count: int, height: int, width: int, seed: int) -> Tensor:
    """Soft blobs [count, height, width] with values in (0, 1), high in the middle and ragged at the rim."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    noise = torch.randn(count, height, width, generator=generator(seed))
    return torch.sigmoid(4 * (0.7 - x**2 - y**2) + 0.7 * noise)


@st.composite
def any_boxes(draw: st.DrawFn, most: int = 300) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4] and scores [N] of what suppression may meet.

    Random, empty, inverted, touching, nested, huge and not finite boxes, copies of each other, and equal, NaN and
    infinite scores.
    """
    count = draw(st.integers(0, most))
    random = generator(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([6.0, 40.0, 1000.0, 1e-20, 1e19]))
    boxes = random_boxes(count, (size, size), int(torch.randint(2**31, (), generator=random)))
    if draw(st.booleans()):  # on a grid: edges that touch, overlaps at the threshold, sides of zero length
        boxes = (boxes / size * 6).round() / 6 * size
    kind = torch.rand(count, generator=random)
    boxes = torch.where(kind[:, None] < 0.1, boxes[:, [2, 3, 0, 1]], boxes)
    boxes = torch.where((kind[:, None] >= 0.1) & (kind[:, None] < 0.15), boxes[:, [2, 1, 0, 3]], boxes)
    degenerate = DEGENERATE_BOXES[torch.randint(0, len(DEGENERATE_BOXES), (count,), generator=random)]
    boxes = torch.where(kind[:, None] > draw(st.sampled_from([0.6, 0.95, 1.0])), degenerate, boxes)
    if count > 0:
        copies = torch.randint(0, count, (count,), generator=random)
        boxes = torch.where((torch.rand(count, generator=random) < 0.2)[:, None], boxes[copies], boxes)
    scores = torch.rand(count, generator=random)
    if draw(st.booleans()):
        scores = (scores * 4).round() / 4 - 0.5
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0])
    chosen = odd[torch.randint(0, len(odd), (count,), generator=random)]
    return boxes, torch.where(torch.rand(count, generator=random) < 0.1, chosen, scores)
