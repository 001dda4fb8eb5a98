"""Networks with custom classes: side by side in one process, in other processes, and without class names."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import panfpn_fast
from panfpn_fast.checkpoints import mmdetection
from panfpn_fast.data import get_categories
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.inference import PanopticResult, Predictor, encode_panoptic
from panfpn_fast.models import PanopticFPN
from support.checkpoint_samples import (
    SMALL,
    save_mmdetection,
    save_torch,
    small_mmdetection_weights,
    small_weights,
)
from support.processes import run

PHOTO = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def write_data_set(root: Path, things: Sequence[str], stuff: Sequence[str]) -> CocoPanopticDataset:
    """Writes one image with one segment of the first stuff class; the name of the JSON is always the same."""
    (root / "images").mkdir(parents=True)
    (root / "panoptic").mkdir()
    Image.fromarray(PHOTO).save(root / "images" / "1.png")
    Image.fromarray(encode_panoptic(np.full((64, 96), 5))).save(root / "panoptic" / "1.png")
    rows = [(name, 1) for name in things] + [(name, 0) for name in stuff]
    colors = [[10 * number, 200, 255 - number] for number in range(len(rows))]
    segment = {"id": 5, "category_id": len(things) + 1, "area": 64 * 96, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": [segment]}],
        "categories": [
            {"id": number + 1, "name": name, "isthing": isthing, "color": colors[number]}
            for number, (name, isthing) in enumerate(rows)
        ],
    }
    (root / "panoptic.json").write_text(json.dumps(content))
    return CocoPanopticDataset(root / "images", root / "panoptic.json")


def network(dataset: CocoPanopticDataset) -> PanopticFPN:
    """Returns a network that labels every pixel with the first stuff class."""
    settings = {name: value for name, value in SMALL.items() if name not in ("num_things", "num_stuff")}
    settings |= {"backbone": "resnet10_narrow", "instance_score_threshold": 1.0, "stuff_area_threshold": 1}
    torch.manual_seed(0)  # a few random networks have boxes with a score of exactly 1
    model = PanopticFPN(**settings, categories=dataset.categories).eval()
    with torch.no_grad():
        model.semantic_head.logits.weight.zero_()
        model.semantic_head.get_parameter("logits.bias").copy_(torch.arange(model.config.num_stuff + 1) == 1)
    return model


def predict(model: PanopticFPN) -> PanopticResult:
    return Predictor(model, "cpu", short_edge=64)(PHOTO)


def test_annotation_files_with_equal_names_and_different_classes(tmp_path: Path) -> None:
    first = write_data_set(tmp_path / "a", ["cell"], ["ground"])
    second = write_data_set(tmp_path / "b", ["crack", "hole"], ["wall"])
    assert first.categories.name == second.categories.name == "panoptic"
    for name, dataset in (("a.pth", first), ("b.pth", second)):
        panfpn_fast.save(network(dataset), tmp_path / name)
    loaded = [panfpn_fast.load(tmp_path / name) for name in ("a.pth", "b.pth")]
    assert [model.config.categories for model in loaded] == [first.categories, second.categories]
    results = [predict(model) for model in loaded]
    assert [result.summary() for result in results] == ["ground", "wall"]
    assert [result.segments[0].category_id for result in results] == [2, 3]
    # Correct the file and open it again in the same process.
    content = json.loads((tmp_path / "a" / "panoptic.json").read_text())
    content["categories"][0]["name"] = "nucleus"
    (tmp_path / "a" / "panoptic.json").write_text(json.dumps(content))
    again = CocoPanopticDataset(tmp_path / "a" / "images", tmp_path / "a" / "panoptic.json")
    assert again.categories.things[0].name == "nucleus"


_DESCRIBED_ELSEWHERE = """
import pickle, sys
from pathlib import Path

path = Path(sys.argv[1])
photo, result = pickle.loads(path.read_bytes())
path.write_bytes(pickle.dumps((result.summary(), repr(result), result.draw(photo).tobytes())))
"""


def test_a_result_is_printed_and_drawn_in_another_process(tmp_path: Path) -> None:
    result = predict(network(write_data_set(tmp_path, ["cell"], ["ground"])))
    assert result.category(result.segments[0]).color == (10, 200, 254)
    path = tmp_path / "result.pickle"
    path.write_bytes(pickle.dumps((PHOTO, result)))
    run([sys.executable, "-c", _DESCRIBED_ELSEWHERE, path])
    assert pickle.loads(path.read_bytes()) == (
        "ground",
        "PanopticResult(64 x 96: ground)",
        result.draw(PHOTO).tobytes(),
    )


def test_checkpoints_of_other_frameworks_without_class_names(tmp_path: Path) -> None:
    save_torch(tmp_path / "a.pth", small_weights())
    save_mmdetection(tmp_path / "b.pth", small_mmdetection_weights())
    for name in ("a.pth", "b.pth"):
        predictor = Predictor(panfpn_fast.load(tmp_path / name), "cpu", short_edge=64)
        assert [category.name for category in predictor.categories.all] == [
            *("thing 1", "thing 2", "thing 3"),
            *("stuff 1", "stuff 2", "stuff 3", "stuff 4"),
        ]
        assert isinstance(predictor(PHOTO).summary(), str)


def test_names_can_be_given_to_a_checkpoint(tmp_path: Path) -> None:
    categories = write_data_set(tmp_path, ["a", "b", "c"], ["d", "e", "f", "g"]).categories
    save_mmdetection(tmp_path / "b.pth", small_mmdetection_weights())
    assert panfpn_fast.load(tmp_path / "b.pth", categories=categories).config.categories == categories
    with pytest.raises(
        ValueError, match=r"b\.pth: categories: expected 3 thing classes, .*'coco_panoptic' has 80"
    ):
        panfpn_fast.load(tmp_path / "b.pth", categories="coco_panoptic")


@pytest.mark.parametrize("key", ["dataset_meta", None])
def test_names_in_mmdetections_checkpoints(tmp_path: Path, key: str | None) -> None:
    weights = small_mmdetection_weights()
    meta: dict[str, Any] = {"classes": tuple("abcdefg")} if key else {"CLASSES": list("abcdefg")}
    save_mmdetection(tmp_path / "a.pth", weights, **({key: meta} if key else meta))
    categories = panfpn_fast.load(tmp_path / "a.pth").config.categories
    assert [(c.id, c.name) for c in categories.all] == list(enumerate("abcdefg", 1))
    assert len(categories.things) == 3
    for names in (list("abcdef"), "abcdefg", [1, 2, 3, 4, 5, 6, 7], [*"abcdef", ""], None):
        save_mmdetection(tmp_path / "b.pth", weights, dataset_meta={"classes": names})
        assert panfpn_fast.load(tmp_path / "b.pth").config.categories.things[0].name == "thing 1"


@pytest.mark.parametrize("name", ["coco_panoptic", "cityscapes"])
def test_names_of_a_built_in_set_in_mmdetections_checkpoints(name: str) -> None:
    known = get_categories(name)
    content = {"meta": {"dataset_meta": {"classes": [category.name for category in known.all]}}}
    found = {"num_things": len(known.things), "num_stuff": len(known.stuff)}
    assert mmdetection.categories(content, found) == {"categories": known}
