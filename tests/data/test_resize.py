from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panfpn_fast.data.images import resize_shortest_edge, resized_shape


@pytest.mark.parametrize(
    ("height", "width", "short_edge", "max_edge", "expected"),
    [
        (427, 640, 480, 800, (480, 719)),
        (640, 427, 480, 800, (719, 480)),
        (427, 640, 800, 1333, (800, 1199)),
        (360, 640, 800, 1333, (750, 1333)),  # max_edge applies
        (480, 480, 800, 1333, (800, 800)),
        (1024, 2048, 1024, 2048, (1024, 2048)),
        (1, 5000, 800, 1333, (1, 1333)),  # the shorter edge is at least 1
        (3, 5, 10, 1000, (10, 17)),  # 16.67 rounds up
    ],
)
def test_known_sizes(
    height: int, width: int, short_edge: int, max_edge: int, expected: tuple[int, int]
) -> None:
    assert resized_shape(height, width, short_edge, max_edge) == expected
    image = np.zeros((height, width, 3), np.uint8)
    assert resize_shortest_edge(image, short_edge, max_edge).shape == (*expected, 3)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1500), st.integers(1, 2000))
def test_size_properties(height: int, width: int, short_edge: int, max_edge: int) -> None:
    new_height, new_width = resized_shape(height, width, short_edge, max_edge)
    assert 1 <= min(new_height, new_width) <= short_edge
    assert max(new_height, new_width) <= max_edge
    # Unless max_edge applies, the shorter edge is exact and the longer edge is within half a pixel.
    if max(height, width) * short_edge / min(height, width) <= max_edge:
        assert min(new_height, new_width) == short_edge
        exact = max(height, width) * short_edge / min(height, width)
        assert math.isclose(max(new_height, new_width), exact, abs_tol=0.5 + 1e-6)
    assert resized_shape(width, height, short_edge, max_edge) == (new_width, new_height)


def test_pixels_are_pillows_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for short_edge in (20, 90):
        resized = resize_shortest_edge(image, short_edge, 1000)
        size = (resized.shape[1], resized.shape[0])
        expected = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(resized, np.asarray(expected))
        # Channels are independent, so their order does not change the result.
        swapped = resize_shortest_edge(image[:, :, ::-1], short_edge, 1000)
        np.testing.assert_array_equal(swapped[:, :, ::-1], resized)


@pytest.mark.parametrize(
    ("shape", "edges", "expected", "digest"),
    [
        ((37, 53), (60, 90), (60, 86), "2d262ac94ee14d94"),
        ((37, 53), (20, 1000), (20, 29), "07bec0c4f1f622d0"),
        ((40, 60), (20, 1000), (20, 30), "daa156a8194125db"),  # exact halving uses another filter
        ((1, 1), (4, 4), (4, 4), None),
        ((64, 48), (16, 21), (21, 16), "d04280916586f577"),
    ],
)
def test_pixels_are_opencvs_for_mmdetection(
    shape: tuple[int, int], edges: tuple[int, int], expected: tuple[int, int], digest: str | None
) -> None:
    """Compares with digests of the results of cv2.resize in OpenCV 5.0.0 with INTER_LINEAR."""
    seed = shape[0] * shape[1]
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    resized = resize_shortest_edge(image, *edges, "mmdetection")
    assert resized.shape == (*expected, 3)
    if digest is None:  # a single pixel is repeated
        assert (resized == image[0, 0]).all()
    else:
        assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == digest


def test_mmdetection_rounds_sizes_in_its_own_order() -> None:
    assert resized_shape(64, 29, 480, 800) == (800, 362)
    assert resized_shape(64, 29, 480, 800, "mmdetection") == (800, 363)  # 362.5
    assert resized_shape(427, 640, 800, 1333, "mmdetection") == (800, 1199)
    assert resized_shape(1, 5000, 800, 1333, "mmdetection") == (1, 1333)
    with pytest.raises(ValueError, match="resize: expected one of detectron2, mmdetection, got 'opencv'"):
        resized_shape(4, 4, 8, 8, "opencv")


def test_known_pixels_when_halving() -> None:
    # For halving, the filter is a triangle over four samples with weights 1, 3, 3, 1 (of 8), cropped at the border.
    image = np.repeat(np.array([[0, 0, 80, 80]], np.uint8)[:, :, None], 3, axis=2).repeat(4, axis=0)
    resized = resize_shortest_edge(image, 2, 100)
    np.testing.assert_array_equal(resized[:, :, 0], [[11, 69], [11, 69]])  # 80 / 7, 80 * 6 / 7


def test_result_is_a_new_writable_array() -> None:
    image = np.zeros((10, 12, 3), np.uint8)
    image.flags.writeable = False
    for short_edge in (10, 20):
        resized = resize_shortest_edge(image, short_edge, 100)
        assert resized.flags.writeable
        assert resized.flags.c_contiguous
        assert not np.shares_memory(resized, image)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), TypeError, "image: expected dtype uint8"),
        ([[1, 2, 3]], TypeError, "image: expected a uint8 RGB array"),
        (np.zeros((4, 4), np.uint8), ValueError, r"image: expected shape \[H, W, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got \[0, 4, 3\]"),
    ],
)
def test_bad_image(image: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resize_shortest_edge(image, 10, 20)


@pytest.mark.parametrize(("edges", "name"), [((0, 10), "short_edge"), ((10, -1), "max_edge")])
def test_bad_edges(edges: tuple[int, int], name: str) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
        resize_shortest_edge(image, *edges)


def test_fractional_edge_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="short_edge: expected an integer number of pixels, got float"):
        resize_shortest_edge(np.zeros((4, 4, 3), np.uint8), 10.5, 20)  # type: ignore[arg-type]
