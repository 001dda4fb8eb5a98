"""Random inputs for the op tests, generated on the CPU from a seed so that they are the same on all devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

# Boxes for which no op may read out of bounds, hang or fail.
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
    """Returns a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, size: Sequence[float], seed: int) -> Tensor:
    """Returns boxes [count, 4] of all sizes up to `size` (height, width), with their centres inside the image."""
    random = generator(seed)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    centre = torch.rand(count, 2, generator=random) * extent
    side = torch.rand(count, 2, generator=random) * extent
    return torch.cat([centre - side / 2, centre + side / 2], dim=1)


def random_rois(count: int, images: int, size: Sequence[float], seed: int) -> Tensor:
    """Returns rows of (image, x1, y1, x2, y2), [count, 5]."""
    image = torch.randint(0, max(images, 1), (count, 1), generator=generator(seed))
    return torch.cat([image.float(), random_boxes(count, size, seed)], dim=1)


def random_features(shape: Sequence[int], seed: int) -> Tensor:
    """Returns feature maps with values of order one."""
    return torch.randn(*shape, generator=generator(seed))


def random_masks(count: int, height: int, width: int, seed: int) -> Tensor:
    """Returns soft blobs [count, height, width] in (0, 1), with high values in the middle and noisy edges."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    noise = torch.randn(count, height, width, generator=generator(seed))
    return torch.sigmoid(4 * (0.7 - x**2 - y**2) + 0.7 * noise)


@st.composite
def any_boxes(draw: st.DrawFn, most: int = 300) -> tuple[Tensor, Tensor]:
    """Generates boxes [N, 4] and scores [N] of all kinds that non-maximum suppression must handle.

    Boxes are random, empty, inverted, touching, nested, huge, not finite, or copies of each other. Scores are random,
    equal, NaN or infinite.
    """
    count = draw(st.integers(0, most))
    random = generator(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([6.0, 40.0, 1000.0, 1e-20, 1e19]))
    boxes = random_boxes(count, (size, size), int(torch.randint(2**31, (), generator=random)))
    # On a grid, edges touch, overlaps are equal to the threshold, and sides have length zero.
    if draw(st.booleans()):
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


def half_covered(samples: int, bins: int = 7) -> Tensor:
    """Returns masks [3, 1, side, side] that cover half of the pixels of every bin.

    Each of `bins` x `bins` bins has `samples` x `samples` pixels, and with `aligned` a sample at the centre of each.
    The masks are columns, rows and a checkerboard.
    """
    pixel = torch.arange(samples * bins)
    columns = (pixel % samples < samples // 2).expand(len(pixel), -1)
    checkerboard = (pixel[:, None] + pixel) % 2 == 0
    return torch.stack([columns, columns.T, checkerboard])[:, None].float()
