from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from panfpn_fast.data.images import ImageReadError, read_image, to_rgb_array

# An image in which all rows, columns and channels differ.
RGB = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_become_rgb(mode: str) -> None:
    image = (
        Image.fromarray(RGB).convert("L" if mode in ("LA", "1") else "RGB").convert(mode)
        if mode != "LAB"
        else (Image.new("LAB", (9, 6)))
    )
    array = to_rgb_array(image)
    assert array.shape == (6, 9, 3)
    assert array.dtype == np.uint8
    if mode in ("RGB", "RGBA", "RGBX"):
        np.testing.assert_array_equal(array, RGB)
    if mode in ("L", "LA", "1"):
        np.testing.assert_array_equal(array[:, :, 0], np.asarray(image.convert("L")))
        np.testing.assert_array_equal(array[:, :, 0], array[:, :, 2])


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, np.arange(54, dtype=np.uint8).reshape(6, 9)])
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), RGB)


def test_palette_with_transparency_gives_its_colors_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = read_image(tmp_path / "palette.png")
    assert array.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 65535], [128 * 257, 300, 40000]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "deep.tif")
    expected = np.array([[0, 1, 255], [128, 1, 156]])
    for name in ("deep.png", "deep.tif"):
        array = read_image(tmp_path / name)
        assert array.dtype == np.uint8
        for channel in range(3):
            np.testing.assert_array_equal(array[:, :, channel], expected)
    np.testing.assert_array_equal(to_rgb_array(Image.fromarray(grey.astype(np.int32)))[:, :, 0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "photo.png", exif=exif)
    # EXIF 2.32, tag Orientation: the sides of the upright image where row 0 and column 0 of the stored image are.
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), upright)
    with Image.open(tmp_path / "photo.png") as image:
        np.testing.assert_array_equal(to_rgb_array(image), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format="PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    (tmp_path / "photo.png").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), RGB)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageReadError, match=rf"broken\.{suffix}"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_file_that_is_not_an_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rubbish.png"
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=r"rubbish\.png") as caught:
        read_image(path)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        read_image(tmp_path / "nowhere.jpg")


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageReadError, match=r"float\.tif: cannot be decoded: 32-bit float"):
        read_image(tmp_path / "float.tif")


def test_empty_pil_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image: expected at least one pixel"):
        to_rgb_array(Image.new("RGB", (0, 5)))
