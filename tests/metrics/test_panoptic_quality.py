"""Panoptic quality: edge cases of panopticapi's rules, and comparison with a plain NumPy implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from panfpn_fast import _C
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.data.files import DataError
from panfpn_fast.metrics import PanopticQuality, match_segments, pq_compute
from support.checkpoint_samples import shared_folder

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 7, "name": "car", "isthing": 1},
    {"id": 100, "name": "sky", "isthing": 0},
]
ISTHING = {1: True, 7: True, 100: False}


def segment(label: int, category: int, area: int = 0, iscrowd: int = 0) -> dict[str, int]:
    return {"id": label, "category_id": category, "area": area, "iscrowd": iscrowd}


def row(*runs: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Returns a map of one row from runs of (label, length)."""
    return np.concatenate([np.full(length, label, np.int32) for label, length in runs])[None]


def quality_of(truth: Any, truth_segments: Any, predicted: Any, predicted_segments: Any) -> dict[str, Any]:
    quality = PanopticQuality(ISTHING)
    quality.add(match_segments(truth, truth_segments, predicted, predicted_segments, ISTHING))
    return quality.result()


def test_exactly_one_half_is_no_match() -> None:
    truth, predicted = row((1, 3), (2, 1)), row((5, 3), (6, 1))
    truth_segments = [segment(1, 1, 3), segment(2, 100, 1)]
    assert quality_of(truth, truth_segments, predicted, [segment(5, 1), segment(6, 100)])["All"]["pq"] == 1
    # The intersection is 2, the union 4.
    truth, predicted = row((1, 3), (0, 1), (2, 2)), row((6, 1), (5, 3), (6, 2))
    half = match_segments(
        truth, [segment(1, 1, 4), segment(2, 100, 2)], predicted, [segment(5, 1), segment(6, 100)], ISTHING
    )
    assert half[1].tp == 0
    assert half[1].fp == half[1].fn == 1
    assert half[100].tp == 1


def test_void_does_not_count_for_the_union() -> None:
    truth, predicted = row((1, 4), (0, 4)), row((5, 8))
    found = match_segments(truth, [segment(1, 1, 4)], predicted, [segment(5, 1)], ISTHING)
    assert found[1].tp == 1
    assert found[1].iou == 1.0


def test_a_prediction_mostly_on_void_is_excused() -> None:
    truth = row((0, 5), (1, 4), (2, 1))
    predicted = row((5, 5), (5, 4), (6, 1))  # 5 of 9 pixels of segment 5 are void
    found = match_segments(
        truth, [segment(1, 7, 4), segment(2, 100, 1)], predicted, [segment(5, 1), segment(6, 100)], ISTHING
    )
    assert 1 not in found
    assert found[7].fn == 1
    exactly_half = match_segments(
        row((0, 4), (1, 4)), [segment(1, 7, 4)], row((5, 8)), [segment(5, 1)], ISTHING
    )
    assert exactly_half[1].fp == 1


def test_only_the_last_crowd_of_a_category_excuses() -> None:
    truth = row((1, 4), (2, 4))
    crowds = [segment(1, 1, 4, iscrowd=1), segment(2, 1, 4, iscrowd=1)]
    predicted = row((5, 4), (6, 4))
    found = match_segments(truth, crowds, predicted, [segment(5, 1), segment(6, 1)], ISTHING)
    assert (found[1].tp, found[1].fp, found[1].fn) == (0, 1, 0)
    found = match_segments(truth, crowds[::-1], predicted, [segment(5, 1), segment(6, 1)], ISTHING)
    assert (found[1].tp, found[1].fp, found[1].fn) == (0, 1, 0)


def test_a_crowd_excuses_its_own_category_only() -> None:
    found = match_segments(row((1, 8)), [segment(1, 1, 8, iscrowd=1)], row((5, 8)), [segment(5, 7)], ISTHING)
    assert found[7].fp == 1


def test_the_true_area_comes_from_the_table() -> None:
    # The segment has 4 pixels in the map but 7 in the table, so the union is 4 + 7 - 4.
    found = match_segments(row((1, 4)), [segment(1, 1, 7)], row((5, 4)), [segment(5, 1)], ISTHING)
    assert found[1].iou == 4 / 7
    found = match_segments(
        row((1, 4)), [{**segment(1, 1), "area": 6.5}], row((5, 4)), [segment(5, 1)], ISTHING
    )
    assert found[1].iou == 4 / 6.5
    with pytest.raises(ValueError, match="segment 1 has the area 0 in the JSON, but 4 pixels in the map"):
        match_segments(row((1, 4)), [segment(1, 1, 0)], row((5, 4)), [segment(5, 1)], ISTHING)


def test_a_predicted_segment_may_have_the_id_0() -> None:
    truth, predicted = row((1, 4), (2, 2), (0, 2)), row((0, 4), (6, 2), (0, 2))
    truth_segments, sky = [segment(1, 1, 4), segment(2, 100, 2)], segment(6, 100)
    found = match_segments(truth, truth_segments, predicted, [segment(0, 1), sky], ISTHING)
    assert (found[1].tp, found[1].iou) == (1, 1.0)  # its two pixels on void do not count
    found = match_segments(truth, truth_segments, predicted, [segment(0, 7), sky], ISTHING)
    assert (found[1].fn, found[7].fp) == (1, 1)  # a third of its pixels are on void, so it is not excused
    found = match_segments(truth, truth_segments, predicted, [sky], ISTHING)
    assert (found[1].fn, 7 in found) == (1, False)
    with pytest.raises(KeyError, match="map lacks segment 0"):
        match_segments(row((1, 4)), [segment(1, 1, 4)], row((5, 4)), [segment(5, 1), segment(0, 7)], ISTHING)


def test_categories_that_do_not_occur_are_left_out_of_the_means() -> None:
    result = quality_of(row((1, 4)), [segment(1, 1, 4)], row((5, 4)), [segment(5, 1)])
    assert result["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1}
    assert result["Stuff"]["n"] == 0
    assert result["per_class"][7] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}


@pytest.mark.parametrize(
    ("predicted", "segments", "message"),
    [
        (row((5, 2), (6, 2)), [segment(5, 1)], "map has a segment 6"),
        (row((5, 4)), [segment(5, 1), segment(6, 1)], "map lacks segment 6"),
        (row((5, 4)), [segment(5, 3)], "unknown category 3"),
    ],
)
def test_maps_and_tables_must_agree(predicted: Any, segments: Any, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        match_segments(row((1, 4)), [segment(1, 1, 4)], predicted, segments, ISTHING, 12)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"image 12: .*same height and width"):
        match_segments(row((1, 4)), [segment(1, 1, 4)], row((5, 5)), [segment(5, 1)], ISTHING, 12)


def _random_image(seed: int) -> tuple[Any, ...]:
    """Returns overlapping rectangles, some void and some crowds; the prediction is the shifted truth."""
    random = np.random.default_rng(seed)
    truth = np.zeros((40 + seed, 61), np.int32)
    table = []
    for label in range(1, 12):
        y, x = random.integers(0, 40), random.integers(0, 60)
        truth[y : y + random.integers(1, 25), x : x + random.integers(1, 25)] = label * 70_000
    for label in np.unique(truth[truth > 0]):
        area = int((truth == label).sum())
        table.append(segment(int(label), int(random.choice([1, 7, 100])), area, int(random.random() < 0.2)))
    predicted = np.roll(truth, random.integers(0, 4, 2), (0, 1)).copy()
    predicted[random.random(predicted.shape) < 0.05] = 0
    labels = [int(label) for label in np.unique(predicted[predicted > 0])]
    kinds = {entry["id"]: entry["category_id"] for entry in table}
    guesses = [segment(p, int(random.choice([kinds[p], kinds[p], 1, 100]))) for p in labels]
    return truth, table, predicted, guesses


def _plain_numpy(truth: Any, table: Any, predicted: Any, guesses: Any) -> dict[int, list[float]]:
    """Applies the same rules with masks, one pair at a time: returns [iou, tp, fp, fn] of each category."""
    tally: dict[int, list[float]] = {category: [0.0, 0, 0, 0] for category in ISTHING}
    taken, found = set(), set()
    for t in table:
        for p in guesses:
            inside, mine = truth == t["id"], predicted == p["id"]
            if t["iscrowd"] or t["category_id"] != p["category_id"] or not (inside & mine).any():
                continue
            union = mine.sum() + t["area"] - (inside & mine).sum() - (mine & (truth == 0)).sum()
            iou = (inside & mine).sum() / union
            if iou > 0.5:
                tally[p["category_id"]][0] += iou
                tally[p["category_id"]][1] += 1
                taken.add(t["id"])
                found.add(p["id"])
    crowd = {}
    for t in table:
        if t["iscrowd"]:
            crowd[t["category_id"]] = t["id"]
        elif t["id"] not in taken:
            tally[t["category_id"]][3] += 1
    for p in guesses:
        mine = predicted == p["id"]
        excused = (mine & (truth == 0)).sum()
        if p["category_id"] in crowd:
            excused += (mine & (truth == crowd[p["category_id"]])).sum()
        if p["id"] not in found and not excused / mine.sum() > 0.5:
            tally[p["category_id"]][2] += 1
    return tally


@pytest.mark.parametrize("seed", range(30))
def test_equals_plain_numpy(seed: int) -> None:
    sample = _random_image(seed)
    truth, table, predicted, guesses = sample
    found = match_segments(truth, table, predicted, guesses, ISTHING)
    for category, (iou, tp, fp, fn) in _plain_numpy(*sample).items():
        tally = found.get(category)
        if tally is None:
            assert (tp, fp, fn) == (0, 0, 0)
        else:
            assert (tally.tp, tally.fp, tally.fn) == (tp, fp, fn)
            assert tally.iou == pytest.approx(iou, rel=1e-12)


def _write(folder: Path, name: str, images: list[tuple[Any, Any]], categories: bool) -> Path:
    (folder / name).mkdir()
    annotations = []
    for i, (ids, table) in enumerate(images):
        Image.fromarray(encode_panoptic(ids)).save(folder / name / f"{i}.png")
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": table})
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({"annotations": annotations, **({"categories": CATEGORIES} if categories else {})})
    )
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    samples = [_random_image(seed) for seed in range(8)]
    truth = _write(tmp_path, "truth", [sample[:2] for sample in samples], categories=True)
    return truth, _write(tmp_path, "predicted", [sample[2:] for sample in samples], categories=False)


def test_pq_compute_accumulates_images(files: tuple[Path, Path]) -> None:
    result = pq_compute(*files)
    tally = {category: np.zeros(4) for category in ISTHING}
    for seed in range(8):
        for category, found in _plain_numpy(*_random_image(seed)).items():
            tally[category] += found
    quality = {c: iou / (tp + fp / 2 + fn / 2) for c, (iou, tp, fp, fn) in tally.items()}
    for category, expected in quality.items():
        assert result["per_class"][category]["pq"] == pytest.approx(expected, rel=1e-12)
    assert result["All"]["pq"] == pytest.approx(np.mean(list(quality.values())), rel=1e-12)
    assert result["Things"]["pq"] == pytest.approx((quality[1] + quality[7]) / 2, rel=1e-12)
    assert pq_compute(*map(str, files)) == result


def test_directories_may_be_elsewhere(files: tuple[Path, Path], tmp_path: Path) -> None:
    expected = pq_compute(*files)
    (tmp_path / "predicted").rename(tmp_path / "other")
    assert pq_compute(*files, pred_folder=tmp_path / "other") == expected
    with pytest.raises(FileNotFoundError, match="predicted: no such folder"):
        pq_compute(*files)


def test_a_damaged_png_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "predicted" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"3\.png: cannot be decoded"):
        pq_compute(*files)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png: no such file"):
        pq_compute(*files)


def test_files_with_a_fractional_area_and_a_predicted_segment_0(tmp_path: Path) -> None:
    ids = np.full((4, 4), 9, np.int32)
    truth = _write(tmp_path, "truth", [(ids, [{**segment(9, 1), "area": 16.5}])], categories=True)
    predicted = _write(tmp_path, "predicted", [(0 * ids, [segment(0, 1)])], categories=False)
    assert pq_compute(truth, predicted)["per_class"][1]["sq"] == 16 / 16.5


def test_an_image_without_prediction_is_named(files: tuple[Path, Path]) -> None:
    content = json.loads(files[1].read_text())
    del content["annotations"][4]
    files[1].write_text(json.dumps(content))
    with pytest.raises(KeyError, match="image 4"):
        pq_compute(*files)


def test_areas_of_a_smaller_map_are_refused(files: tuple[Path, Path]) -> None:
    content = json.loads(files[0].read_text())
    for entry in content["annotations"][2]["segments_info"]:
        entry["area"] //= 4
    files[0].write_text(json.dumps(content))
    message = (
        r"truth\.json: image 2: segment \d+ has the area \d+ in the JSON, but \d+ pixels in the map; count"
    )
    with pytest.raises(DataError, match=message):
        pq_compute(*files)


def test_a_damaged_json_is_named(files: tuple[Path, Path]) -> None:
    files[1].write_text(files[1].read_text()[:-5])
    with pytest.raises(ValueError, match=r"predicted\.json: cannot be read"):
        pq_compute(*files)


def test_the_truth_against_itself() -> None:
    shared = shared_folder()
    for name in ("coco_sample/panoptic.json", "nuclei/panoptic_val.json"):
        path = shared / name
        result = pq_compute(path, path)
        assert result["All"]["pq"] == 1.0
        assert result["All"]["n"] > 0


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 4), np.uint8), np.zeros((4, 4), np.int32).T[::2]]
)
def test_label_maps_are_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match="first"):
        _C.count_label_pairs(bad, bad)


def test_pairs_of_colours_and_numbers_agree() -> None:
    random = np.random.default_rng(0)
    first = random.integers(0, 2**24, (300, 7)).astype(
        np.int32
    )  # more labels than the initial hash table has slots
    second = random.integers(0, 3, (300, 7)).astype(np.int32)
    expected = _C.count_label_pairs(first, second)
    assert expected == _C.count_label_pairs(encode_panoptic(first), second)
    assert expected == _C.count_label_pairs(encode_panoptic(first), encode_panoptic(second))
    pairs, counts = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_counts=True)
    assert expected == [(int(a), int(b), int(n)) for (a, b), n in zip(pairs.T, counts, strict=True)]


def test_empty_maps() -> None:
    empty = np.zeros((0, 5), np.int32)
    assert match_segments(empty, [], empty, [], ISTHING) == {}
    assert PanopticQuality(ISTHING).result()["All"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 0}


def test_parts_merge_into_the_whole() -> None:
    random = np.random.default_rng(0)
    whole, parts = PanopticQuality(ISTHING), [PanopticQuality(ISTHING) for _ in range(3)]
    for image in range(30):
        truth = random.integers(1, 4, (6, 6), dtype=np.int32)
        predicted = np.where(random.random((6, 6)) < 0.3, 1, truth).astype(np.int32)
        segments = [
            segment(i, category, int((truth == i).sum())) for i, category in ((1, 1), (2, 7), (3, 100))
        ]
        found = match_segments(truth, segments, predicted, segments, ISTHING)
        whole.add(found)
        parts[image % 3].add(found)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    assert parts[2].result() == whole.result()
    assert 0 < whole.result()["All"]["pq"] < 1
