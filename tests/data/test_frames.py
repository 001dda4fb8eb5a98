"""Image files with several frames, and formats that need a plugin."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from panfpn_fast.data import files, read_image
from panfpn_fast.data.files import ImageReadError
from panfpn_fast.data.images import has_frames, read_frames

COLORS = [(200, 30, 60), (20, 180, 90), (90, 90, 250)]


def save_frames(path: Path, **options: Any) -> Path:
    pictures = [Image.new("RGB", (12, 8), color) for color in COLORS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp", "avif"])
def test_every_frame(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = save_frames(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    found = list(read_frames(path))
    assert has_frames(path)
    assert [number for number, _ in found] == [1, 2, 3]
    for (_, image), color in zip(found, COLORS, strict=True):
        assert (image.shape, image.dtype) == ((8, 12, 3), np.dtype(np.uint8))
        assert np.abs(image.astype(int) - color).max() <= (8 if suffix == "avif" else 0)
    np.testing.assert_array_equal(read_image(path), found[0][1])


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp", "jpg", "ico", "bmp"])
def test_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (32, 32), COLORS[0]).save(path)
    assert [(number, image.shape) for number, image in read_frames(path)] == [(None, (32, 32, 3))]
    assert not has_frames(path)


def test_previews_and_reduced_copies_are_no_images(tmp_path: Path) -> None:
    mpo = save_frames(tmp_path / "a.mpo", format="MPO")  # as phones write photographs
    assert Image.open(mpo).n_frames == 3  # type: ignore[attr-defined]
    assert [number for number, _ in read_frames(mpo)] == [None]
    for kinds, numbers in (((0, 1, 1), [None]), ((0, 1, 0), [1, 3])):
        pictures = [Image.new("RGB", (12, 8), color) for color in COLORS]
        for picture, kind in zip(pictures, kinds, strict=True):
            picture.encoderinfo = {"tiffinfo": {254: kind}}  # type: ignore[attr-defined]
        path = tmp_path / f"{len(numbers)}.tiff"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], tiffinfo={254: kinds[0]})
        assert [number for number, _ in read_frames(path)] == numbers


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.tiff")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageReadError, match=r"a\.tiff: cannot be decoded"):
        list(read_frames(path))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(HEIC)  # the content tells, not the suffix
    files._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ImageReadError, match=r"a\.jpg: cannot be decoded: HEIC images need.* pip install pillow-heif"
    ):
        read_image(tmp_path / "a.jpg")


def test_heic_with_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)

    class Plugin(Image.Image):
        def __init__(self, file: Any, name: str) -> None:
            super().__init__()
            self._im = Image.new("RGB", (7, 5), COLORS[0]).im  # type: ignore[attr-defined]
            self._mode, self._size = "RGB", (7, 5)

    def register() -> None:
        Image.register_open("HEIF", Plugin, lambda head: head[8:12] == b"heic")  # type: ignore[arg-type]

    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    files._register_heif.cache_clear()
    image = read_image(tmp_path / "a.heic")
    files._register_heif.cache_clear()
    assert image.shape == (5, 7, 3)
    assert (image == COLORS[0]).all()


def test_avif_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif" + bytes(64))
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ImageReadError, match=r"this Pillow reads no AVIF.* pip install --upgrade pillow"):
        read_image(tmp_path / "a.avif")
