"""Samples, targets, transforms, synthetic scenes and the reader of COCO's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.sample import IGNORE, Sample, make_target, segment_boxes
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.transforms import Crop, Exposure, Flip, KeepBoxes, Photometric, QuarterTurn, Resize
from support.checkpoint_samples import shared_folder


def small_sample() -> Sample:
    segments = torch.tensor([[1, 1, 0, 2], [3, 1, 4, 2], [3, 3, 4, 5]], dtype=torch.int32)
    return Sample(
        image=torch.arange(36, dtype=torch.uint8).reshape(3, 3, 4),
        segments=segments,
        isthing=torch.tensor([True, False, True, True, False, True]),
        label=torch.tensor([7, 2, 7, 3, 9, 1]),
        crowd=torch.tensor([False, False, True, False, False, False]),
        area=torch.tensor([3, 2, 3, 2, 1, 0]),
        image_id=1,
        file_name="small",
    )


def test_target_of_every_kind_of_segment() -> None:
    target = make_target(small_sample())
    # Segment 2 is a crowd region, and segment 5 has no pixel.
    assert target.classes.tolist() == [7, 3]
    assert target.boxes.tolist() == [[0, 0, 2, 2], [2, 1, 3, 3]]
    assert target.instances.tolist() == [[1, 1, 0, 0], [0, 1, 2, 0], [0, 0, 2, 0]]
    assert target.semantic.tolist() == [[0, 0, IGNORE, 2], [0, 0, 0, 2], [0, 0, 0, 9]]


def test_boxes_and_areas_equal_a_loop() -> None:
    segments = torch.randint(0, 9, (13, 17), generator=torch.Generator().manual_seed(0))
    boxes, areas = segment_boxes(segments, 8)
    for k in range(8):
        y, x = torch.nonzero(segments == k + 1, as_tuple=True)
        assert areas[k] == len(y)
        assert boxes[k].tolist() == [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 3)])
def test_no_segments(shape: tuple[int, int]) -> None:
    boxes, areas = segment_boxes(torch.zeros(shape, dtype=torch.int32), 0)
    assert boxes.shape == (0, 4)
    assert areas.shape == (0,)


def test_flip_moves_both_maps() -> None:
    sample = small_sample()
    flipped = Flip(1.0)(sample, np.random.default_rng(0))
    assert torch.equal(flipped.image, sample.image.flip(2))
    assert torch.equal(flipped.segments, sample.segments.flip(1))
    assert make_target(flipped).boxes.tolist() == [[2, 0, 4, 2], [1, 1, 2, 3]]
    assert Flip(0.0)(sample, np.random.default_rng(0)) is sample


def test_resize_keeps_the_maps_together() -> None:
    sample = SyntheticDataset(1).load(0)
    resized = Resize((64,), 1000)(sample, np.random.default_rng(0))
    there = Resize((64,), 1000, resize="mmdetection")(sample, np.random.default_rng(0))
    assert there.image.shape == resized.image.shape
    assert not torch.equal(there.image, resized.image)
    assert resized.size == (64, 96)
    assert resized.segments.shape == (64, 96)
    assert set(resized.segments.unique().tolist()) <= set(sample.segments.unique().tolist())
    boxes, _ = segment_boxes(sample.segments, len(sample.label))
    smaller, areas = segment_boxes(resized.segments, len(sample.label))
    assert (boxes[areas > 0] / 2 - smaller[areas > 0]).abs().max() <= 1
    lengths = {
        Resize((30, 50), 1000, continuous=True)(sample, np.random.default_rng(i)).size[0] for i in range(40)
    }
    assert {30, 50} & lengths
    assert lengths <= set(range(30, 51))


def test_boxes_of_the_annotation_are_resized_and_mirrored() -> None:
    random = np.random.default_rng(0)
    sample = KeepBoxes()(small_sample(), random)
    assert make_target(sample).boxes.tolist() == [[0, 0, 2, 2], [2, 1, 3, 3]]
    resized = Resize((7,), 100)(sample, random)
    assert resized.size == (7, 9)
    y, x = 7 / 3, 9 / 4
    expected = torch.tensor([[0, 0, 2 * x, 2 * y], [2 * x, y, 3 * x, 3 * y]])
    torch.testing.assert_close(make_target(resized).boxes, expected)
    flipped = make_target(Flip(1.0)(resized, random)).boxes
    torch.testing.assert_close(
        flipped, torch.tensor([[9 - 2 * x, 0, 9, 2 * y], [9 - 3 * x, y, 9 - 2 * x, 7]])
    )
    # After a crop, and without `KeepBoxes`, the boxes are around the masks.
    around = make_target(Resize((7,), 100)(small_sample(), random)).boxes
    assert torch.equal(around, around.round())
    assert not torch.equal(around, make_target(resized).boxes)
    assert torch.equal(make_target(Crop((7, 9))(resized, random)).boxes, around)


def test_crop_larger_than_the_image() -> None:
    sample = SyntheticDataset(1).load(0)
    crop = Crop((40, 500))(sample, np.random.default_rng(0))
    assert crop.size == (40, 192)
    top = next(i for i in range(89) if torch.equal(sample.image[:, i : i + 40], crop.image))
    assert torch.equal(crop.segments, sample.segments[top : top + 40])


def test_crop_avoids_windows_of_one_class() -> None:
    segments = torch.ones(64, 64, dtype=torch.int32)
    segments[:, 40:] = 2
    sample = Sample(
        torch.zeros(3, 64, 64, dtype=torch.uint8), segments, torch.tensor([False, False]), torch.tensor([1, 2]),
        torch.tensor([False, False]), torch.tensor([2560, 1536]), 0, "",
    )  # fmt: skip
    shares = []
    for seed in range(30):
        found = Crop((16, 16), 0.75)(sample, np.random.default_rng(seed)).segments
        shares.append(float((found == 1).float().mean()))
    mixed = sum(0.2 < share < 0.8 for share in shares)
    assert mixed > 20  # without the rule, one window in five is mixed


def test_segments_are_resized_as_pillow_does() -> None:
    random = np.random.default_rng(0)
    sample = small_sample()
    for short in (*range(1, 40), 223, 800):
        height, width = random.integers(1, 90, 2)
        ids = random.integers(0, 6, (height, width), dtype=np.int32)
        sample.segments = torch.from_numpy(ids)
        sample.image = torch.zeros(3, height, width, dtype=torch.uint8)
        resized = Resize([short], 1000)(sample, random)
        expected = Image.fromarray(ids).resize(resized.size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resized.segments.numpy(), np.asarray(expected))


def test_photometric_changes_the_image_only() -> None:
    sample = SyntheticDataset(1).load(0)
    changed = Photometric()(sample, np.random.default_rng(1))
    assert changed.image.dtype == torch.uint8
    assert not torch.equal(changed.image, sample.image)
    assert changed.segments is sample.segments
    same = Photometric(0, 0, 0)(sample, np.random.default_rng(1))
    assert (same.image.int() - sample.image.int()).abs().max() <= 1


def test_quarter_turns_rotate_boxes_with_the_maps() -> None:
    sample = KeepBoxes()(small_sample(), np.random.default_rng(0))
    found = {}
    for seed in range(20):
        turned = QuarterTurn()(sample, np.random.default_rng(seed))
        turns = next(k for k in range(4) if torch.equal(turned.segments, sample.segments.rot90(k, (0, 1))))
        assert torch.equal(turned.image, sample.image.rot90(turns, (1, 2)))
        around, _ = segment_boxes(turned.segments, len(turned.label))
        assert turned.boxes is not None
        assert torch.equal(turned.boxes[:4], around[:4].double())  # the fifth has no pixels
        found[turns] = turned.size
    assert found == {0: (3, 4), 1: (4, 3), 2: (3, 4), 3: (4, 3)}


def test_exposure_scales_all_values() -> None:
    sample = small_sample()
    sample.image = torch.full_like(sample.image, 40)
    sample.image[:, 0] = 0
    seen = set()
    for seed in range(40):
        changed = Exposure(2.0)(sample, np.random.default_rng(seed))
        assert changed.image[:, 0].eq(0).all()
        assert changed.segments is sample.segments
        seen |= set(changed.image[:, 1:].unique().tolist())
    assert min(seen) < 25
    assert 70 < max(seen) <= 80
    assert min(seen) >= 20
    sample.image = torch.full_like(sample.image, 250)
    brightest = max(int(Exposure(2.0)(sample, np.random.default_rng(i)).image.max()) for i in range(40))
    assert brightest == 255


def test_scenes_depend_only_on_seed_and_index() -> None:
    first, again = SyntheticDataset(5, seed=2).load(3), SyntheticDataset(9, seed=2).load(3)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.segments, again.segments)
    assert not torch.equal(first.image, SyntheticDataset(5, seed=3).load(3).image)
    with pytest.raises(IndexError, match=r"index: expected 0\.\.4"):
        SyntheticDataset(5).load(5)


def test_scenes_have_all_classes_and_little_void() -> None:
    dataset = SyntheticDataset(40)
    things, stuff, void = set(), set(), 0
    for index in range(40):
        sample = dataset.load(index)
        target = make_target(sample)
        things |= set(target.classes.tolist())
        stuff |= set(target.semantic.unique().tolist())
        void += int((sample.segments == 0).sum())
        _, areas = segment_boxes(sample.segments, len(sample.label))
        assert ((areas == 0) | (areas >= 30) | ~sample.isthing).all()
    assert things == {0, 1, 2, 3}
    assert stuff == {0, 1, 2, 3, 4, IGNORE}
    assert 0 < void < 0.02 * 40 * 128 * 192


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    """A copy of the validation images and annotations, which the tests damage."""
    source = shared_folder() / "nuclei"
    shutil.copytree(source / "panoptic_val", tmp_path / "panoptic_val")
    shutil.copytree(source / "val", tmp_path / "val")
    shutil.copy(source / "panoptic_val.json", tmp_path)
    return tmp_path


def test_real_annotations_load(nuclei: Path) -> None:
    dataset = CocoPanopticDataset(nuclei / "val", nuclei / "panoptic_val.json")
    assert len(dataset) == 68
    assert len(dataset.categories.things) == len(dataset.categories.stuff) == 1
    table = json.loads((nuclei / "panoptic_val.json").read_text())["annotations"][0]["segments_info"]
    sample = dataset.load(0)
    _, areas = segment_boxes(sample.segments, len(table))
    assert areas.tolist() == [segment["area"] for segment in table]
    target = make_target(sample)
    assert len(target.boxes) == sum(
        segment["category_id"] == dataset.categories.things[0].id for segment in table
    )


def test_labels_match_the_categories_of_coco() -> None:
    root = shared_folder() / "coco_sample"
    dataset = CocoPanopticDataset(root / "images", root / "panoptic.json", categories="coco_panoptic")
    sample = dataset.load(0)
    table = json.loads((root / "panoptic.json").read_text())["annotations"][0]["segments_info"]
    for row, segment in enumerate(table):
        label = int(sample.label[row])
        categories = dataset.categories
        category = categories.things[label] if sample.isthing[row] else categories.stuff[label - 1]
        assert category.id == segment["category_id"]


def test_damage_is_named(nuclei: Path) -> None:
    def load() -> Sample:
        return CocoPanopticDataset(nuclei / "val", nuclei / "panoptic_val.json").load(0)

    path = nuclei / "panoptic_val.json"
    content = json.loads(path.read_text())
    annotation = content["annotations"][0]
    png = nuclei / "panoptic_val" / annotation["file_name"]

    segment = annotation["segments_info"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"segment {segment['id']} is missing from segments_info"):
        load()
    annotation["segments_info"].append({**segment, "category_id": 77})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="unknown category 77"):
        load()
    annotation["segments_info"][-1] = segment
    path.write_text(json.dumps(content))
    load()

    whole = png.read_bytes()
    png.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{png.name}: cannot be decoded"):
        load()
    png.unlink()
    with pytest.raises(FileNotFoundError, match=f"{png.name}: no such file"):
        load()
    path.write_text("{")
    with pytest.raises(DataError, match=r"panoptic_val\.json: cannot be read as JSON"):
        load()
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="expected a list 'images'"):
        load()
