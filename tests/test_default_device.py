"""Data, training, evaluation and the commands do not depend on torch's default device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from panfpn_fast.data import PanopticDataset, ReadingRules, open_dataset
from panfpn_fast.data.sample import make_target, semantic_map
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.transforms import Compose, Crop, Flip, Photometric, Resize
from panfpn_fast.inference import Predictor
from panfpn_fast.metrics import SemanticQuality
from panfpn_fast.metrics.evaluation import evaluate
from support.annotated_folders import RULES, WRITERS
from support.city_samples import write_city
from support.training_runs import tiny, train, weights


@pytest.fixture(params=[torch.device("meta"), torch.float64, torch.bfloat16], ids=str)
def changed_default(request: pytest.FixtureRequest) -> Iterator[torch.device | torch.dtype]:
    """A default to set; it is restored after the test."""
    yield request.param
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def set_default(value: torch.device | torch.dtype) -> None:
    if isinstance(value, torch.device):
        torch.set_default_device(value)
    else:
        torch.set_default_dtype(value)


def loaded(datasets: Sequence[PanopticDataset]) -> list[Tensor]:
    """Returns the tensors of samples of each data set, transformed and as targets."""
    transform = Compose([Resize((24, 40), 80), Crop((20, 30), 0.9), Flip(), Photometric()])
    found: list[Tensor] = []
    for dataset in datasets:
        sample = dataset.load(0)
        changed = transform(sample, np.random.default_rng(0))
        columns = (sample.image, sample.segments, sample.isthing, sample.label, sample.crowd, sample.area)
        found += [*columns, semantic_map(sample), changed.image, changed.segments, *make_target(changed)]
    return found


def check_data(opened: Callable[[], Sequence[PanopticDataset]], default: torch.device | torch.dtype) -> None:
    expected = loaded(opened())
    set_default(default)
    for tensor, other in zip(loaded(opened()), expected, strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


def test_data(tmp_path: Path, changed_default: torch.device | torch.dtype) -> None:
    write_city(tmp_path, {"a": ["a_0"]})
    check_data(
        lambda: [SyntheticDataset(2, seed=1), open_dataset("cityscapes", str(tmp_path), "val")],
        changed_default,
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_formats(kind: str, tmp_path: Path, changed_default: torch.device | torch.dtype) -> None:
    for package in ("pycocotools", "yaml") * (kind in ("coco_instances", "yolo", "labelme")):
        pytest.importorskip(package)
    where, rules = WRITERS[kind](tmp_path, "train"), ReadingRules(**RULES.get(kind, {}))
    check_data(lambda: [open_dataset(kind, *where, rules=rules)], changed_default)


def test_training_and_evaluation(tmp_path: Path, changed_default: torch.device | torch.dtype) -> None:
    config = tiny(solver={"steps": 2, "ema": 0.5}, workers=1)

    def figures(name: str) -> tuple[dict[str, Tensor], object]:
        trainer = train(config, tmp_path / name)
        predictor = Predictor(trainer.model, "cpu", short_edge=64)
        result = evaluate(predictor, SyntheticDataset(2, 5), with_ap=False, quiet=True, workers=1)
        return weights(trainer.model), str(result)

    expected, evaluated = figures("before")
    set_default(changed_default)
    found, again = figures("after")
    assert again == evaluated
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_iou(changed_default: torch.device | torch.dtype) -> None:
    truth, predicted = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 1]])
    set_default(changed_default)
    quality = SemanticQuality(2, 255, {1: 2.0})
    quality.add(truth, predicted, truth)
    assert quality.result()["iou"] == [0.5, 0.5]
