"""CityscapesDataset follows the rules of createPanopticImgs.py."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import TrainLoader
from panfpn_fast.data.sample import IGNORE, make_target
from panfpn_fast.data.transforms import Compose, Crop, Flip, Resize
from panfpn_fast.training.config import get_train_preset
from panfpn_fast.training.setup import make_datasets
from support.city_samples import CAR, PARKING, PERSON, ROAD, SKY, street, write_city


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_city(tmp_path, {"bonn": ["bonn_000001_000019"], "aachen": ["aachen_0", "aachen_1"]})
    return tmp_path


def test_images_of_all_cities_in_order(root: Path) -> None:
    dataset = CityscapesDataset(root, "val")
    ids = [dataset.load(index).image_id for index in range(len(dataset))]
    assert ids == ["aachen_0", "aachen_1", "bonn_000001_000019"]


def test_every_kind_of_number(root: Path) -> None:
    dataset = CityscapesDataset(root, "val")
    sample, numbers = dataset.load(0), torch.from_numpy(street().astype(np.int32))
    truth = {
        ROAD: (False, False),
        SKY: (False, False),
        PERSON: (True, True),
        1000 * CAR: (True, False),
        1000 * CAR + 1: (True, False),
    }
    assert len(sample.label) == len(truth)
    for row, (number, (isthing, crowd)) in enumerate(sorted(truth.items())):
        assert (bool(sample.isthing[row]), bool(sample.crowd[row])) == (isthing, crowd)
        assert torch.equal(sample.segments == row + 1, numbers == number)
        assert int(sample.area[row]) == int((numbers == number).sum())
        categories = dataset.categories
        label = int(sample.label[row])
        category = categories.things[label] if isthing else categories.stuff[label - 1]
        assert category.id == (number if number < 1000 else number // 1000)
    assert torch.equal(sample.segments == 0, numbers == PARKING)
    target = make_target(sample)
    assert target.classes.tolist() == [2, 2]  # the cars; a group is not an instance
    assert torch.equal(target.semantic == IGNORE, numbers == PARKING)


def truth_of(root: Path) -> Path:
    return root / "gtFine" / "val" / "aachen" / "aachen_0_gtFine_instanceIds.png"


def write(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def fails(root: Path, path: Path, message: str) -> None:
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: {message}"):
        CityscapesDataset(root, "val").load(0)


def test_damage_is_named(root: Path) -> None:
    path = truth_of(root)
    write(path, street(32, 60))
    fails(root, path, "expected 64 x 32 pixels, the size of .*aachen_0_leftImg8bit.png, got 60 x 32")
    for number in (34, 999):
        write(path, np.where(street() == SKY, np.uint16(number), street()))
        fails(root, path, f"the value {number} has label {number}, which Cityscapes does not define")
    write(path, np.where(street() == SKY, np.uint16(34_000), street()))
    fails(root, path, "expected values from 0 to 33999, got 7..34000")
    write(path, np.zeros((32, 64, 3), np.uint8))
    fails(root, path, "expected gray pixels of 8 or 16 bits, got pixels of Pillow's mode RGB")
    write(path, street())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(root, path, "cannot be decoded")
    path.unlink()
    fails(root, path, "no such file")


def test_missing_directories_are_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"leftImg8bit.train: no such folder"):
        CityscapesDataset(root, "train")
    (root / "leftImg8bit" / "train").mkdir()
    with pytest.raises(DataError, match=r"gtFine.train: no such folder"):
        CityscapesDataset(root, "train")
    (root / "gtFine" / "train").mkdir()
    with pytest.raises(DataError, match=r"no image is named <city>/<name>_leftImg8bit\.png"):
        CityscapesDataset(root, "train")


def test_the_preset_trains_and_evaluates_on_it(root: Path) -> None:
    write_city(root, {"ulm": ["ulm_0"]}, "train")
    data = get_train_preset("cityscapes").data
    data.images = str(root)
    training, held_out = make_datasets(data, seed=0)
    assert held_out is not None
    assert (len(training), len(held_out)) == (1, 3)
    data.val_annotations = ""
    assert make_datasets(data, seed=0)[1] is None


def test_batches_of_crops(root: Path) -> None:
    transform = Compose([Resize([32, 64], 128, continuous=True), Crop((24, 40), 0.9), Flip()])
    loader = TrainLoader(CityscapesDataset(root, "val"), transform, 3, seed=1)
    for batch in islice(loader, 2):
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert image.shape == (3, 24, 40)
            assert target.semantic.shape == target.instances.shape == (24, 40)
            assert int(target.instances.max()) == len(target.boxes)
