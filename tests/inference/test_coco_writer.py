from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panfpn_fast._files import atomic_write
from panfpn_fast.data import get_categories
from panfpn_fast.inference import CocoPanopticWriter, PanopticResult, decode_panoptic, encode_panoptic

COCO = get_categories("coco_panoptic")


def read_json(out: Path) -> Any:
    return json.loads((out / "predictions.json").read_text())


@given(st.lists(st.integers(0, 256**3 - 1), min_size=1, max_size=20))
def test_encoding_round_trip(ids: list[int]) -> None:
    panoptic = np.array([ids], np.int32)
    rgb = encode_panoptic(panoptic)
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(decode_panoptic(rgb), panoptic)


def test_known_encoding() -> None:
    assert encode_panoptic(np.array([[0, 255, 256, 65536 * 3 + 256 * 2 + 1]])).tolist() == [
        [[0, 0, 0], [255, 0, 0], [0, 1, 0], [1, 2, 3]]
    ]
    assert encode_panoptic(np.zeros((0, 4), np.int32)).shape == (0, 4, 3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.uint32, np.uint64])
def test_ids_of_any_integer_dtype(dtype: type[np.integer[Any]]) -> None:
    ids = np.array(
        [[0, 1, np.iinfo(dtype).max if dtype in (np.int8, np.uint8, np.uint16) else 256**3 - 1]], dtype
    )
    np.testing.assert_array_equal(decode_panoptic(encode_panoptic(ids)), ids)


@pytest.mark.parametrize("bad", [-1, 256**3])
def test_ids_out_of_range(bad: int) -> None:
    with pytest.raises(ValueError, match=r"panoptic: expected ids in 0\.\.16777215"):
        encode_panoptic(np.array([[1, bad]]))


def test_written_files_agree(result: PanopticResult, tmp_path: Path) -> None:
    with CocoPanopticWriter(tmp_path / "a" / "b", COCO) as writer:
        writer.add(result, "000000000139", "000000000139.jpg")
        writer.add(result, "holiday", "holiday.jpg")
    content = read_json(tmp_path / "a" / "b")
    assert content["images"] == [
        {"id": 139, "file_name": "000000000139.jpg", "width": 200, "height": 120},
        {"id": "holiday", "file_name": "holiday.jpg", "width": 200, "height": 120},
    ]
    categories = {category["id"]: category for category in content["categories"]}
    assert len(categories) == 133
    assert [a["image_id"] for a in content["annotations"]] == [139, "holiday"]
    for annotation in content["annotations"]:
        png = Image.open(tmp_path / "a" / "b" / "predictions" / annotation["file_name"])
        assert (png.mode, png.format) == ("RGB", "PNG")
        panoptic = decode_panoptic(np.asarray(png))
        np.testing.assert_array_equal(panoptic, result.panoptic.numpy())
        ids, counts = np.unique(panoptic[panoptic != 0], return_counts=True)
        segments = {info["id"]: info for info in annotation["segments_info"]}
        assert sorted(segments) == ids.tolist()
        assert len(segments) == len(annotation["segments_info"])
        for id_, count in zip(ids.tolist(), counts.tolist(), strict=True):
            assert segments[id_]["area"] == count
            assert segments[id_]["isthing"] == categories[segments[id_]["category_id"]]["isthing"]
            assert ("score" in segments[id_]) == bool(segments[id_]["isthing"])


def test_image_ids_are_unique(result: PanopticResult, tmp_path: Path) -> None:
    with CocoPanopticWriter(tmp_path, COCO) as writer:
        for name in ("7", "07", "7_2", "²"):
            writer.add(result, name, f"{name}.jpg")
    assert [image["id"] for image in read_json(tmp_path)["images"]] == [7, "07", "7_2", "²"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_json_is_written_when_an_exception_ends_the_run(
    result: PanopticResult, tmp_path: Path, error: type[BaseException]
) -> None:
    def run() -> None:
        with CocoPanopticWriter(tmp_path, COCO) as writer:
            writer.add(result, "first", "first.jpg")
            raise error

    with pytest.raises(error):
        run()
    assert [image["id"] for image in read_json(tmp_path)["images"]] == ["first"]


def test_json_is_written_during_the_run(result: PanopticResult, tmp_path: Path) -> None:
    writer = CocoPanopticWriter(tmp_path, COCO, flush_seconds=0.0)
    writer.add(result, "first", "first.jpg")
    assert [image["id"] for image in read_json(tmp_path)["images"]] == ["first"]


def test_results_of_several_processes_are_in_the_order_of_their_positions(
    result: PanopticResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process has listed the other's result already, in the order of names."""
    first, second = (CocoPanopticWriter(tmp_path, COCO, rank=rank) for rank in (0, 1))
    second.add(result, "a", "a.jpg", (3, 0))
    first.flush()
    assert [image["id"] for image in read_json(tmp_path)["images"]] == ["a"]
    first.add(result, "z", "z.jpg", (0, 2))
    first.add(result, "b", "b.jpg", (0, 10))
    monkeypatch.setattr("panfpn_fast.inference.coco_writer.gather", lambda own: [own, second._added])
    first.gather()
    assert [image["id"] for image in read_json(tmp_path)["images"]] == ["z", "b", "a"]


def test_empty_run_writes_a_valid_file(tmp_path: Path) -> None:
    with CocoPanopticWriter(tmp_path, COCO):
        pass
    content = read_json(tmp_path)
    assert content["images"] == content["annotations"] == []


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
