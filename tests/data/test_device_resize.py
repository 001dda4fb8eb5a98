"""The resize on a device gives the pixels of the resize on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from panfpn_fast.data.device_resize import resize_pixels, resize_plan
from panfpn_fast.data.images import ImageArray, resize_shortest_edge, resized_shape

SIDE = st.integers(1, 70)


def noise(height: int, width: int, seed: int = 0) -> ImageArray:
    """Returns random pixels; with an odd seed black and white ones, which give the largest sums."""
    random = np.random.default_rng(seed)
    grey = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(grey > 127, 255, 0).astype(np.uint8) if seed % 2 else grey


def resized(image: ImageArray, new: tuple[int, int], resize: str, device: torch.device) -> ImageArray:
    plan = resize_plan(image.shape[:2], new, resize)
    assert plan is not None
    tables = (torch.from_numpy(table).to(device) for table in plan[:2])
    found: ImageArray = resize_pixels(torch.from_numpy(image).to(device), plan, *tables).cpu().numpy()
    return found


def pillows(image: ImageArray, new: tuple[int, int]) -> ImageArray:
    return np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR))


@settings(max_examples=150, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 9))
def test_equals_pillow(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    image, new = noise(height, width, seed), (new_height, new_width)
    if new != (height, width):
        found = resized(image, new, "detectron2", torch.device("cpu"))
        np.testing.assert_array_equal(found, pillows(image, new))


@pytest.mark.parametrize("resize", ["detectron2", "mmdetection"])
@pytest.mark.parametrize(
    ("size", "edges"),
    [
        ((48, 64), (80, 133)),  # larger
        ((427, 640), (128, 213)),  # smaller
        ((640, 97), (80, 133)),
        ((80, 300), (80, 133)),
        ((97, 97), (96, 200)),
        ((90, 120), (45, 133)),  # halved
        ((3, 500), (10, 200)),
    ],
)
def test_equals_the_resize_of_images(
    size: tuple[int, int], edges: tuple[int, int], resize: str, device: torch.device
) -> None:
    for seed in (0, 1):
        image = noise(*size, seed)
        found = resized(image, resized_shape(*size, *edges, resize), resize, device)
        np.testing.assert_array_equal(found, resize_shortest_edge(image, *edges, resize))


def in_order(order: tuple[int, int]) -> Callable[..., Image.Image]:
    """Returns a stand-in for Pillow's resize, which resizes axes in an order: 0 is the width."""
    real = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        for axis in order:
            width, height = self.size
            step = (size[0], height) if axis == 0 else (width, size[1])
            self = real(self, step, resample)
        return self

    return resize


@pytest.mark.parametrize("size", [(40, 50), (150, 20), (300, 400)])
def test_follows_the_order_of_the_installed_pillow(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, new = noise(*size), (64, 81)
    results = []
    for order in ((0, 1), (1, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", in_order(order))
            plan = resize_plan.__wrapped__(size, new, "detectron2")
            expected = pillows(image, new)
        assert plan is not None
        assert plan.columns_first == (order == (0, 1))
        found = resize_pixels(torch.from_numpy(image), plan, *map(torch.from_numpy, plan[:2]))
        np.testing.assert_array_equal(found.numpy(), expected)
        results.append(expected)
    assert not np.array_equal(results[0], results[1])


def test_no_plan_for_another_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, _: real(self, size, Image.Resampling.BOX))
    assert resize_plan.__wrapped__((40, 50), (64, 81), "detectron2") is None
    assert resize_plan.__wrapped__((40, 50), (64, 81), "mmdetection") is not None


@pytest.mark.parametrize("resize", ["detectron2", "mmdetection"])
def test_no_host_sync(resize: str) -> None:
    """On fake tensors, whatever the host needs to read is an error."""
    plan = resize_plan((427, 640), (128, 192), resize)
    assert plan is not None
    with FakeTensorMode():
        image = torch.empty(427, 640, 3, dtype=torch.uint8, device="cuda")
        tables = (torch.empty(table.shape, dtype=torch.int32, device="cuda") for table in plan[:2])
        found = resize_pixels(image, plan, *tables)
    assert (found.shape, found.dtype, found.device.type) == ((128, 192, 3), torch.uint8, "cuda")
