"""paste_masks_rle: its CUDA kernels, compiled for the CPU, return the bytes of the CPU op."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from panfpn_fast import ops
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes, random_masks
from support.poison import poisoned

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Bits that no thread has written would add runs."""
    with poisoned():
        yield


def assert_equals_the_cpu(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Compares the strings and their offsets; returns the offsets."""
    args = (masks, boxes, *image_size, threshold)
    text, offsets = torch.ops.panfpn_fast_cuda_on_host.paste_masks_rle(*args)
    expected_text, expected_offsets = torch.ops.panfpn_fast.paste_masks_rle(*args)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(text, expected_text)
    assert isinstance(offsets, Tensor)
    return offsets


def boxes_around(image_size: tuple[int, int]) -> Tensor:
    """Returns boxes inside, on, across and outside of the edges of an image, flipped boxes and boxes without area."""

    def ranges(size: int) -> Tensor:
        inside = [[0, size], [0, size / 2], [size / 2, size], [0.3 * size, 0.7 * size]]
        return torch.tensor([*inside, [-3, size + 4], [size, size + 5], [-9, -2], [size, 0], [1, 1]])

    rows, columns = ranges(image_size[0]), ranges(image_size[1])
    x, y = columns.repeat_interleave(len(rows), 0), rows.repeat(len(columns), 1)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


# Columns of whole words and others, one row, one column, more words than lanes.
SIZES = [(1, 1), (1, 40), (40, 1), (5, 3), (31, 7), (32, 7), (33, 6), (64, 65), (70, 130), (0, 9), (9, 0)]


@pytest.mark.parametrize("image_size", SIZES, ids=str)
def test_runs_at_the_edges_of_images(image_size: tuple[int, int], host_library: ctypes.CDLL) -> None:
    boxes = boxes_around(image_size)
    assert_equals_the_cpu(random_masks(len(boxes), 6, 5, 0), boxes, image_size)
    assert_equals_the_cpu(torch.ones(len(boxes), 4, 4), boxes, image_size)


def test_zeros(host_library: ctypes.CDLL) -> None:
    boxes = boxes_around((40, 33))
    for threshold in (0.5, 0.0):
        assert_equals_the_cpu(torch.zeros(len(boxes), 3, 2), boxes, (40, 33), threshold)


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.3, 1.0, 1.5, INF, -1.0, NAN])
def test_thresholds(threshold: float, host_library: ctypes.CDLL) -> None:
    masks = random_masks(len(DEGENERATE_BOXES) + 5, 9, 7, 1)
    masks[-1] = 1
    boxes = torch.cat([DEGENERATE_BOXES, random_boxes(5, (37, 41), 1)])
    assert_equals_the_cpu(masks, boxes, (37, 41), threshold)


@pytest.mark.parametrize("mask_size", [(0, 0), (0, 3), (3, 0), (1, 1), (28, 1)], ids=str)
def test_sizes_of_masks(mask_size: tuple[int, int], host_library: ctypes.CDLL) -> None:
    boxes = torch.cat([DEGENERATE_BOXES, random_boxes(5, (37, 41), 1)])
    for threshold in (0.5, 0.0):
        assert_equals_the_cpu(
            torch.rand(len(boxes), *mask_size, generator=generator(2)), boxes, (37, 41), threshold
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool], ids=str)
def test_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, host_library: ctypes.CDLL) -> None:
    masks = random_masks(5, 14, 14, 10)
    masks = masks > 0.5 if dtype == torch.bool else masks.to(dtype)
    boxes = random_boxes(5, (37, 41), 10).to(torch.bfloat16)
    expected = ops.paste_masks_rle(masks, boxes, (37, 41))
    host_op = torch.ops.panfpn_fast_cuda_on_host.paste_masks_rle
    monkeypatch.setattr(torch.ops.panfpn_fast, "paste_masks_rle", host_op)
    assert ops.paste_masks_rle(masks[:, None], boxes, (37, 41)) == expected


def test_cells_that_are_not_finite(host_library: ctypes.CDLL) -> None:
    masks = random_masks(6, 8, 8, 3)
    masks[:, 2, 3], masks[:, 5, 5], masks[:, 6, 1] = NAN, INF, -INF
    assert_equals_the_cpu(masks, random_boxes(6, (50, 40), 3), (50, 40))


def test_any_boxes(host_library: ctypes.CDLL) -> None:
    for seed in range(20):
        random = generator(seed)
        height, width, rows, columns = torch.randint(1, 90, (4,), generator=random).tolist()
        boxes = random_boxes(20, (height, width), seed)
        boxes = torch.where(torch.rand(20, 1, generator=random) < 0.3, boxes.round(), boxes)
        masks = torch.rand(20, rows, columns, generator=random)
        assert_equals_the_cpu(masks, boxes, (height, width), 0.1 + 0.1 * (seed % 9))


def test_runs_of_noise_and_of_many_words(thread_order: str) -> None:
    """More ends of runs in a round than fit in shared memory, rounds without any, and several rounds."""
    noise = torch.rand(1, 150, 130, generator=generator(4))
    noise[0, :, 40:60] = 0
    assert_equals_the_cpu(noise, torch.tensor([[0.0, 0.0, 130.0, 150.0]]), (150, 130))
    boxes = torch.tensor([[-40.0, -5.0, 1050.0, 306.0], [0.0, 3.0, 1000.0, 290.0]])
    assert_equals_the_cpu(random_masks(2, 28, 28, 5), boxes, (300, 1000))


def test_runs_of_exactly_one_round(host_library: ctypes.CDLL) -> None:
    """The change at the end of the last column comes in a round of its own."""
    height, width = 32, 4096
    stripes = (torch.arange(width) % 4 == 3).float().repeat(1, height, 1)
    box = torch.tensor([[0.0, 0.0, width, height]])
    for image_width in (width, width + 1):
        assert_equals_the_cpu(stripes, box, (height, image_width))


def test_long_numbers(host_library: ctypes.CDLL) -> None:
    """Pixels are counted in 64 bits, and lengths take up to seven characters."""
    masks = random_masks(3, 14, 14, 6)
    boxes = torch.tensor(
        [[2.0, 1e8, 7.0, 1e8 + 512], [17.0, 3.0, 90.0, 40.0], [19.0, 2.6e8, 30.0, 2.6e8 + 640]]
    )
    assert_equals_the_cpu(masks, boxes, (2**28, 20))


@pytest.mark.parametrize("count", [0, 1, 511, 512, 1300])
def test_numbers_of_instances(count: int, host_library: ctypes.CDLL) -> None:
    launches = host_library.panfpn_host_launch_count()
    offsets = assert_equals_the_cpu(random_masks(count, 3, 4, 7), random_boxes(count, (9, 7), 7), (9, 7))
    assert len(offsets) == count + 1
    assert host_library.panfpn_host_launch_count() - launches == (5 if count > 0 else 1)


def test_several_batches(host_library: ctypes.CDLL) -> None:
    """The bits of 36 instances do not fit in the memory for one batch."""
    count, image_size = 36, (3, 2**20)
    corner = torch.rand(count, 2, generator=generator(8)) * torch.tensor([2.0**20, 2.0])
    boxes = torch.cat([corner, corner + torch.tensor([50.0, 2.0])], dim=1)
    launches = host_library.panfpn_host_launch_count()
    assert_equals_the_cpu(random_masks(count, 5, 6, 8), boxes, image_size)
    assert host_library.panfpn_host_launch_count() - launches == 2 + 2 * 2 * 2
