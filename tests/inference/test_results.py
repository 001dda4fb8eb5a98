"""What results write, and what they convert to."""

from __future__ import annotations

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image, ImageShow

from panfpn_fast.data import get_categories
from panfpn_fast.inference import Instances, PanopticResult, Segment, decode_panoptic

COCO = get_categories("coco_panoptic")
PHOTO = np.random.default_rng(5).integers(0, 256, (120, 200, 3), dtype=np.uint8)


@pytest.fixture
def photographed(result: PanopticResult) -> PanopticResult:
    return replace(result, image=PHOTO, source="photos/000000000139.jpg")


def empty(height: int, width: int) -> PanopticResult:
    """Returns a result without segments, for a black image."""
    nothing = Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0, 28, 28))
    void = torch.zeros(height, width, dtype=torch.int32)
    return PanopticResult(void, [], nothing, void.byte(), COCO, np.zeros((height, width, 3), np.uint8))


def test_draws_its_own_image(photographed: PanopticResult) -> None:
    assert photographed.draw().tobytes() == photographed.draw(PHOTO).tobytes()
    assert photographed.draw(PHOTO // 2).tobytes() != photographed.draw().tobytes()


def test_without_an_image(result: PanopticResult) -> None:
    with pytest.raises(ValueError, match="image: expected an image, because the result was made without one"):
        result.draw()
    assert result._repr_png_() is None


def test_pickled_results_draw_the_same(photographed: PanopticResult) -> None:
    again = pickle.loads(pickle.dumps(photographed))
    assert again.draw().tobytes() == photographed.draw().tobytes()
    assert again.source == photographed.source


def test_notebooks_get_a_picture(photographed: PanopticResult) -> None:
    found = photographed._repr_png_()
    assert found is not None
    assert Image.open(io.BytesIO(found)).tobytes() == photographed.draw().tobytes()
    large = empty(2, 3000)._repr_png_()
    assert large is not None
    assert Image.open(io.BytesIO(large)).size == (1000, 1)


def test_show(photographed: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Image.Image] = []

    def show(picture: Image.Image) -> bool:
        shown.append(picture)
        return True

    monkeypatch.setattr(ImageShow, "show", show)
    photographed.show(labels=False)
    [picture] = shown
    assert picture.tobytes() == photographed.draw(labels=False).tobytes()


def test_show_in_a_notebook(photographed: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Image.Image] = []
    shell = SimpleNamespace(kernel=None)
    for name, module in (
        ("IPython", SimpleNamespace(get_ipython=lambda: shell)),
        ("IPython.display", SimpleNamespace(display=shown.append)),
    ):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    monkeypatch.setattr(ImageShow, "_viewers", [])
    photographed.show(labels=False)
    [picture] = shown
    assert picture.tobytes() == photographed.draw(labels=False).tobytes()


def test_show_without_a_viewer(photographed: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(RuntimeError, match=r'show: found no image viewer; .* result\.save\("drawn\.png"\)'):
        photographed.show()


def test_save_a_picture(photographed: PanopticResult, tmp_path: Path) -> None:
    photographed.save(tmp_path / "new" / "drawn.png", opacity=0.2)
    assert Image.open(tmp_path / "new" / "drawn.png").tobytes() == photographed.draw(opacity=0.2).tobytes()
    for suffix, kind in (
        (".jpg", "JPEG"),
        (".JPEG", "JPEG"),
        (".webp", "WEBP"),
        (".tif", "TIFF"),
        (".bmp", "BMP"),
    ):
        photographed.save(str(tmp_path / f"drawn{suffix}"))
        with Image.open(tmp_path / f"drawn{suffix}") as picture:
            assert (picture.format, picture.size) == (kind, (200, 120))


def test_save_the_segments(photographed: PanopticResult, tmp_path: Path) -> None:
    photographed.save(tmp_path / "found.json")
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["images"] == [{"id": 139, "file_name": "000000000139.jpg", "width": 200, "height": 120}]
    [annotation] = content["annotations"]
    assert annotation["image_id"] == 139
    with Image.open(tmp_path / "found" / annotation["file_name"]) as png:
        assert_array_equal(decode_panoptic(np.asarray(png)), photographed.panoptic.numpy())
    assert annotation["segments_info"] == [
        {"id": 1, "category_id": 1, "isthing": 1, "area": 5400, "score": 0.9},
        {"id": 2, "category_id": 1, "isthing": 1, "area": 6000, "score": 0.8},
        {"id": 3, "category_id": 193, "isthing": 0, "area": 11400},
    ]
    assert len(content["categories"]) == 133


def test_the_map_replaces_no_photograph(result: PanopticResult, tmp_path: Path) -> None:
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.fromarray(PHOTO).save(photo)
    before = photo.read_bytes()
    found = replace(result, source=str(photo))
    with pytest.raises(
        ValueError, match=r"photos/a\.png: there is a file .*; give another name than .*photos"
    ):
        found.save(tmp_path / "photos.json")
    assert photo.read_bytes() == before
    assert not (tmp_path / "photos.json").exists()
    for _ in range(2):  # the second call replaces the files of the first one
        found.save(tmp_path / "maps.json")
    assert (tmp_path / "maps" / "a.png").is_file()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (None, ["image", "image.png"]),
        ("https://example.org/a/b.jpg?size=1", ["b.jpg", "b.png"]),
        ("dog.webp", ["dog.webp", "dog.png"]),
    ],
)
def test_names_of_sources(
    result: PanopticResult, source: str | None, names: list[str], tmp_path: Path
) -> None:
    replace(result, source=source).save(tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert [content["images"][0]["file_name"], content["annotations"][0]["file_name"]] == names
    assert (tmp_path / "x" / names[1]).is_file()


def test_bad_paths(photographed: PanopticResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.json or .*, got 'drawn'"):
        photographed.save(tmp_path / "drawn")
    with pytest.raises(ValueError, match=r"got 'x\.docx'"):
        photographed.save(tmp_path / "x.docx")
    with pytest.raises(TypeError, match="is not a picture, so it takes no option labels"):
        photographed.save(tmp_path / "x.json", labels=False)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="path: expected a folder, got the file"):
        photographed.save(tmp_path / "file" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_that_cannot_be_written(photographed: PanopticResult, tmp_path: Path) -> None:
    (tmp_path / "found").touch()
    with pytest.raises(OSError, match=r"path: .*found\.json needs the folder .*, but .*; give another name$"):
        photographed.save(tmp_path / "found.json")
    for name in (f"{'x' * 300}.png", f"{'x' * 300}.json"):
        with pytest.raises(
            OSError, match=r"path: .*x\.\w+ cannot be written .*too long.*; give another name"
        ):
            photographed.save(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"path: Pillow cannot write .*x\.xbm in the format XBM .*; give x\.png"
    ):
        photographed.save(tmp_path / "x.xbm")
    with pytest.raises(FileNotFoundError, match=r"nope\.png: no such file$"):
        photographed.save(tmp_path / "x.png", image=tmp_path / "nope.png")
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    long = replace(photographed, source="https://example.org/" + "é" * 200)
    long.save(tmp_path / "long.json")
    assert [path.name for path in (tmp_path / "long").iterdir()] == ["é" * 125 + ".png"]


def test_pycocotools_reads_the_segments(
    photographed: PanopticResult, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed").COCO()
    coco.dataset = json.loads(json.dumps(photographed.to_coco()))
    coco.createIndex()
    assert coco.getImgIds() == [139]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[139]))
    assert [one["id"] for one in annotations] == [1, 2, 3]
    for annotation, segment in zip(annotations, photographed.segments, strict=True):
        assert_array_equal(coco.annToMask(annotation), segment.mask.numpy())
        assert annotation["bbox"] == list(segment.bbox)
        assert annotation["area"] == segment.area
        assert annotation["iscrowd"] == 0
        assert annotation.get("score") == segment.score
        assert ("score" in annotation) == segment.isthing
        assert coco.loadCats(annotation["category_id"])[0]["name"] == segment.name
    capsys.readouterr()  # pycocotools prints


def test_ids_in_coco(result: PanopticResult) -> None:
    content = result.to_coco()
    assert content["images"] == [{"id": 1, "file_name": "image", "width": 200, "height": 120}]
    content = result.to_coco(image_id=7, first_id=4)
    assert [one["id"] for one in content["annotations"]] == [4, 5, 6]
    assert {one["image_id"] for one in content["annotations"]} == {7} == {content["images"][0]["id"]}


def test_ids_of_numpy_in_coco(result: PanopticResult) -> None:
    content = result.to_coco(image_id=np.int64(3), first_id=np.int64(4))  # type: ignore[arg-type]
    assert json.loads(json.dumps(content)) == result.to_coco(image_id=3, first_id=4)
    with pytest.raises(TypeError):
        result.to_coco(image_id=1.5)  # type: ignore[arg-type]


def test_tables_read_the_map_once(result: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment's own methods read it once more, and give the same."""
    expected = [(segment.bbox, segment.rle(), segment.mask.numpy()) for segment in result.segments]

    def read_again(segment: Segment) -> Any:
        raise AssertionError(segment)

    monkeypatch.setattr(Segment, "_crop", read_again)
    monkeypatch.setattr(Segment, "mask", property(read_again))
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Columns))  # type: ignore[arg-type]
    for row, mask, (box, rle, whole) in zip(
        result.to_coco()["annotations"], result.to_supervision()["mask"], expected, strict=True
    ):
        assert row["bbox"] == list(box)
        assert row["segmentation"] == {"size": rle["size"], "counts": rle["counts"].decode()}
        assert_array_equal(mask, whole)
    fake = SimpleNamespace(DataFrame=Columns, array=lambda values, dtype: (values, dtype))
    monkeypatch.setitem(sys.modules, "pandas", fake)  # type: ignore[arg-type]
    table = result.to_dataframe()
    assert list(zip(*(table[side] for side in ("x", "y", "width", "height")), strict=True)) == [
        box for box, _, _ in expected
    ]


def test_segments_that_a_changed_map_lacks(result: PanopticResult) -> None:
    result.panoptic[result.panoptic == 2] = 0
    row = result.to_coco()["annotations"][1]
    assert row["bbox"] == list(result.segments[1].bbox) == [0, 0, 0, 0]
    assert row["segmentation"]["counts"] == result.segments[1].rle()["counts"].decode()


def test_dataframe(result: PanopticResult) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = result.to_dataframe()
    assert table["name"].tolist() == ["person", "person", "grass-merged"]
    assert table["isthing"].tolist() == [True, True, False]
    assert table["score"].isna().tolist() == [False, False, True]
    assert table["instance"].isna().tolist() == [False, False, True]
    assert table[["x", "y", "width", "height"]].to_numpy().tolist() == [list(s.bbox) for s in result.segments]
    assert table.groupby("name")["area"].sum().to_dict() == {"person": 11400, "grass-merged": 11400}
    none = empty(3, 4).to_dataframe()
    assert len(none) == 0
    assert none.dtypes["score"] == np.float64


def test_supervision(result: PanopticResult) -> None:
    pytest.importorskip("supervision", reason="supervision is not installed")
    found = result.to_supervision()
    assert len(found) == 3
    assert found[found["isthing"]].confidence.tolist() == pytest.approx([0.9, 0.8])
    assert len(empty(3, 4).to_supervision()) == 0


class Columns(dict[str, Any]):
    """Stands in for pandas.DataFrame and supervision.Detections: keeps its arguments."""


def test_columns_of_the_dataframe(result: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(DataFrame=Columns, array=lambda values, dtype: (values, dtype))
    monkeypatch.setitem(sys.modules, "pandas", fake)  # type: ignore[arg-type]
    table = result.to_dataframe()
    assert table["id"].tolist() == [1, 2, 3]
    assert table["category_id"].tolist() == [1, 1, 193]
    assert table["class_index"].tolist() == [0, 0, 45]
    assert_array_equal(table["score"], [0.9, 0.8, np.nan])
    assert table["instance"] == ([0, 1, None], "Int64")
    assert [table[side].tolist() for side in ("x", "y", "width", "height")] == [
        [0, 90, 0],
        [0, 0, 60],
        [90, 100, 190],
        [60, 60, 60],
    ]
    assert all(len(column) == 0 for name, column in empty(3, 4).to_dataframe().items() if name != "instance")


def test_fields_of_supervisions_detections(result: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Columns))  # type: ignore[arg-type]
    found = result.to_supervision()
    assert_array_equal(
        found["xyxy"], np.array([[0, 0, 90, 60], [90, 0, 190, 60], [0, 60, 190, 120]], np.float32)
    )
    assert_array_equal(found["confidence"], np.array([0.9, 0.8, np.nan], np.float32))
    assert_array_equal(found["mask"], np.stack([segment.mask.numpy() for segment in result.segments]))
    assert found["class_id"].tolist() == [1, 1, 193]
    assert found["data"]["class_name"].tolist() == ["person", "person", "grass-merged"]
    assert found["data"]["isthing"].tolist() == [True, True, False]
    assert found["data"]["segment_id"].tolist() == [1, 2, 3]
    assert empty(3, 4).to_supervision()["mask"].shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("package", "method"), [("pandas", "to_dataframe"), ("supervision", "to_supervision")]
)
def test_missing_packages(
    result: PanopticResult, package: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ImportError, match=rf"{method} needs {package} \(.*\): pip install {package}"):
        getattr(result, method)()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_results_without_segments(size: tuple[int, int], tmp_path: Path) -> None:
    result = empty(*size)
    assert repr(result) == f"PanopticResult({size[0]} x {size[1]}: nothing)"
    assert result.to_coco()["annotations"] == []
    result.save(tmp_path / "drawn.png")
    result.save(tmp_path / "found.json")
    assert not np.asarray(Image.open(tmp_path / "drawn.png")).any()
    assert json.loads((tmp_path / "found.json").read_text())["annotations"][0]["segments_info"] == []
