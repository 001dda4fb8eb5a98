"""Predictions of the rows of a table, without an engine; tests/test_predict_with_ray.py has one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast import save
from panfpn_fast.data import get_categories
from panfpn_fast.inference import (
    BatchPredictor,
    CocoPanopticWriter,
    PredictToFolder,
    decode_panoptic,
    find_maps,
    write_maps,
)
from panfpn_fast.inference.coco_writer import read_written
from support.repository import repository
from support.training_samples import small_model

MakeModel = Callable[..., Any]
PHOTO = np.random.default_rng(3).integers(0, 256, (30, 50, 3), dtype=np.uint8)
SEGMENTS = [
    {"id": 1, "category_id": 18, "isthing": 1, "area": 750, "score": 0.75},
    {"id": 2, "category_id": 187, "isthing": 0, "area": 750},
]


def file_of(pixels: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


@pytest.fixture
def make(halves_model: MakeModel) -> Callable[..., BatchPredictor]:
    def make(kind: type[BatchPredictor] = BatchPredictor, **arguments: Any) -> BatchPredictor:
        return kind(halves_model(), device="cpu", short_edge=30, instances="all", **arguments)

    return make


def test_columns(make: Callable[..., BatchPredictor]) -> None:
    batch = {"name": np.array(["a", "b"]), "bytes": [file_of(PHOTO), file_of(PHOTO[:20])], "rank": [1, 2]}
    found = make()(batch)
    assert list(found) == ["name", "rank", "panoptic_png", "segments", "error"]
    assert found["error"].tolist() == ["", ""]
    assert json.loads(found["segments"][0]) == SEGMENTS
    maps = [decode_panoptic(np.asarray(Image.open(io.BytesIO(png)))) for png in found["panoptic_png"]]
    assert [one.shape for one in maps] == [(30, 50), (20, 50)]
    assert np.unique(maps[0]).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["bytes", "arrays", "one array", "read-only", "paths"])
@pytest.mark.filterwarnings("error")
def test_all_kinds_of_images(make: Callable[..., BatchPredictor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(file_of(PHOTO))
    arrays = np.empty(2, object)
    arrays[:] = [PHOTO, PHOTO[:20]]
    frozen = np.stack([PHOTO, PHOTO])
    frozen.flags.writeable = False
    images = {
        "bytes": [path.read_bytes(), bytearray(path.read_bytes())],
        "arrays": arrays,
        "one array": np.stack([PHOTO, PHOTO]),
        "read-only": frozen,
        "paths": np.array([str(path), str(path)]),
    }[kind]
    found = make(images="photo")({"photo": images})
    assert found["error"].tolist() == ["", ""]
    assert json.loads(found["segments"][0]) == SEGMENTS
    assert ("photo" in found) == (kind == "paths")


def test_a_bad_image_is_an_error_of_its_row(make: Callable[..., BatchPredictor], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.jpg")
    whole = file_of(PHOTO)
    values = [whole, b"", whole[:-30], None, missing, PHOTO[..., 0], whole]
    found = make(images="photo", batch_size=4)({"photo": values})
    errors = found["error"].tolist()
    assert [bool(error) for error in errors] == [False, True, True, True, True, True, False]
    assert errors[1] == "photo[1]: cannot be decoded: not an image in a known format"
    assert errors[4] == f"{missing}: no such file"
    assert "photo[3]: expected a uint8 RGB array" in errors[3]
    assert (found["panoptic_png"][1], found["segments"][1]) == (b"", "[]")
    assert json.loads(found["segments"][6]) == SEGMENTS


def test_zeros_at_the_end_of_bytes_are_kept(make: Callable[..., BatchPredictor]) -> None:
    found = make()({"bytes": [file_of(PHOTO)], "other": [b"a\0"]})
    assert found["other"].tolist() == [b"a\0"]


@pytest.mark.parametrize("kind", [BatchPredictor, PredictToFolder])
def test_no_rows(make: Callable[..., BatchPredictor], tmp_path: Path, kind: type[BatchPredictor]) -> None:
    extra = {} if kind is BatchPredictor else {"out": tmp_path}
    found = make(kind, **extra)({"name": [], "bytes": []})
    assert {name: len(column) for name, column in found.items()} == {
        **dict.fromkeys(("name", "bytes", "segments", "error"), 0),
        **({"panoptic_png": 0} if kind is BatchPredictor else {}),
    }


def test_images_that_do_not_fit_together(
    make: Callable[..., BatchPredictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = make(batch_size=3)
    inner = predict.predictor

    def limited(images: list[np.ndarray]) -> Any:
        if len(images) > 1 or images[0].shape[0] == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(images)

    monkeypatch.setattr(predict, "predictor", limited)
    monkeypatch.setattr(limited, "device", "cuda:0", raising=False)
    found = predict({"bytes": [file_of(PHOTO), file_of(PHOTO[:20]), file_of(PHOTO)]})
    assert found["error"].tolist() == ["", "not enough memory on cuda:0; try a smaller short_edge", ""]


def test_other_errors_of_the_network_are_raised(
    make: Callable[..., BatchPredictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(images: list[np.ndarray]) -> Any:
        raise RuntimeError("a bug")

    predict = make()
    monkeypatch.setattr(predict, "predictor", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        predict({"bytes": [file_of(PHOTO)]})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": []}, "batch: expected a column 'bytes', got image"),
        ({}, "batch: expected a column 'bytes', got none"),
        ({"bytes": [], "error": []}, "batch: expected no column 'error', which is added; rename it before"),
    ],
)
def test_wrong_columns(make: Callable[..., BatchPredictor], batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(batch)


def test_wrong_arguments(make: Callable[..., BatchPredictor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="attempts: expected at least 1, got 0"):
        make(PredictToFolder, out=tmp_path, attempts=0)


def test_masks_are_computed_for_the_map_only() -> None:
    assert BatchPredictor(small_model(), device="cpu").predictor.instances == "panoptic"


def test_written_maps_are_found(make: Callable[..., BatchPredictor], tmp_path: Path) -> None:
    names = ["a", "b", "7", "never"]
    batch = {
        "name": names[:3],
        "source": ["x.jpg", "y.jpg", "z.jpg"],
        "bytes": [file_of(PHOTO), b"", file_of(PHOTO[:20])],
    }
    rest = write_maps(make()(batch), tmp_path)
    assert sorted(rest) == ["error", "name", "segments", "source"]
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["7.png", "a.png"]
    assert find_maps(tmp_path, names) == {"a", "7"}
    with CocoPanopticWriter(tmp_path, get_categories("coco_panoptic")) as writer:
        pass
    content = json.loads(writer.json_path.read_text())
    assert content["images"] == [
        {"id": 7, "file_name": "z.jpg", "width": 50, "height": 20},
        {"id": "a", "file_name": "x.jpg", "width": 50, "height": 30},
    ]
    assert content["annotations"][1] == {"image_id": "a", "file_name": "a.png", "segments_info": SEGMENTS}


def test_the_png_of_a_path_is_that_of_the_writer(halves_model: MakeModel, tmp_path: Path) -> None:
    """A later run of `predict` in the folder finds the result of the same image."""
    path = tmp_path / "photo.png"
    path.write_bytes(file_of(PHOTO))
    predict = BatchPredictor(halves_model(), "image", device="cpu", short_edge=30, instances="all")
    write_maps(predict({"name": ["photo"], "image": [str(path)]}), tmp_path / "table")
    with CocoPanopticWriter(tmp_path / "one", predict.predictor.categories) as writer:
        writer.add(predict.predictor(path), "photo", "photo.png")
    one, table = (tmp_path / out / "predictions" / "photo.png" for out in ("one", "table"))
    assert read_written(one) == read_written(table)
    assert one.read_bytes() == table.read_bytes()


def test_other_files_are_not_results(tmp_path: Path) -> None:
    assert find_maps(tmp_path / "missing", ["a"]) == set()
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a.png").write_bytes(file_of(PHOTO))
    (tmp_path / "predictions" / "b.png").write_bytes(b"")
    (tmp_path / "predictions" / "c.png").mkdir()
    assert find_maps(tmp_path, "abc") == set()


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", "/a", ".", 7, None])
def test_a_name_is_no_path(make: Callable[..., BatchPredictor], tmp_path: Path, name: Any) -> None:
    out = tmp_path / "out"
    message = f"name: expected the name of a file without folders, got {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        write_maps({"name": [name], "panoptic_png": [b"x"], "error": [""]}, out)
    with pytest.raises(ValueError, match=message):
        make(PredictToFolder, out=out)({"name": [name], "bytes": [file_of(PHOTO)]})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_maps_need_names(make: Callable[..., BatchPredictor], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="batch: expected a column 'name', got panoptic_png, segments, error"
    ):
        write_maps(make()({"bytes": [file_of(PHOTO)]}), tmp_path)
    with pytest.raises(ValueError, match="batch: expected a column 'name', got bytes"):
        make(PredictToFolder, out=tmp_path)({"bytes": [file_of(PHOTO)]})


def test_an_image_that_ends_its_process_becomes_an_error(
    make: Callable[..., BatchPredictor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batch = {"name": ["a", "poison", "b"], "image": [PHOTO, PHOTO[:20], PHOTO]}
    predict = make(PredictToFolder, out=tmp_path, images="image", attempts=2)
    inner = predict.predictor

    def ends(images: list[np.ndarray]) -> Any:
        if images[0].shape[0] == 20:
            raise KeyboardInterrupt  # stands for the end of the process: nothing handles it
        return inner(images)

    monkeypatch.setattr(predict, "predictor", ends)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            predict(batch)
    found = predict(batch)
    assert found["error"].tolist() == [
        "",
        "ended its process 2 times; its size may exceed the memory",
        "",
    ]
    assert find_maps(tmp_path, ["a", "poison", "b"]) == {"a", "b"}
    assert list((tmp_path / "attempts").iterdir()) == []
    monkeypatch.setattr(predict, "predictor", inner)  # a later run has more memory
    assert predict(batch)["error"].tolist() == ["", "", ""]


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs the block of docs/batch.md that needs no Ray."""
    page = repository(monkeypatch) / "docs" / "batch.md"
    monkeypatch.chdir(tmp_path)
    save(small_model(), "model.pth")
    Image.fromarray(PHOTO).save("a.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if "import ray" not in block]
    names: dict[str, Any] = {}
    exec(compile(block, page.name, "exec"), names)
    assert names["columns"]["error"].tolist() == [""]
