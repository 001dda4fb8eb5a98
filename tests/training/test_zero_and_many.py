"""Data sets without stuff, without things, and with many classes, from the JSON to the exported program."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import panfpn_fast
from panfpn_fast.cli.main import main
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import Batch, TrainLoader
from panfpn_fast.data.sample import IGNORE, Sample, make_target
from panfpn_fast.data.transforms import Compose, Crop, Flip, Resize
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.inference.export import export
from panfpn_fast.metrics import pq_compute
from panfpn_fast.metrics.evaluation import evaluate
from panfpn_fast.metrics.tables import format_table
from panfpn_fast.models import PanopticFPN
from panfpn_fast.models.padded import PaddedPanopticFPN, unpad
from panfpn_fast.training.network import TrainingNetwork, total
from support.class_samples import SMALL_RUN, write_panoptic
from support.training_samples import small_model
from support.true_predictor import TruePredictor

THINGS = [{"id": 4, "name": "crack", "isthing": 1}, {"id": 9, "name": "hole", "isthing": 1}]
STUFF = [{"id": 3, "name": "field", "isthing": 0}, {"id": 8, "name": "water", "isthing": 0}]


@pytest.mark.parametrize(
    ("categories", "task", "absent"), [(THINGS, "instance", "stuff"), (STUFF, "semantic", "things")]
)
def test_one_kind_of_classes_from_the_json_to_the_export(
    categories: list[dict[str, Any]],
    task: str,
    absent: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")
    pytest.importorskip("pycocotools")
    images, annotations = write_panoptic(tmp_path / "data", categories)
    out, where = tmp_path / "run", ["--device", "cpu"]
    settings = [f"data.{part}images={images}" for part in ("", "val_")]
    settings += [f"data.{part}annotations={annotations}" for part in ("", "val_")]
    assert main(["train", "--preset", "nuclei", "--out", str(out), *where, *settings, *SMALL_RUN]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert ("loss_mask" in lines[0], "loss_semantic" in lines[0]) == (task == "instance", task == "semantic")
    assert lines[-1]["PQ"] is not None
    assert lines[-1][f"PQ_{absent}"] is None

    weights = str(out / "model.pth")
    model = panfpn_fast.load(weights).eval()
    assert model.config.tasks == (task,)
    assert [c.name for c in model.config.categories.all] == [c["name"] for c in categories]
    panfpn_fast.save(model, tmp_path / "again.pth")
    assert panfpn_fast.load(tmp_path / "again.pth").config == model.config

    edges = ["--short-edge", "64"]
    arguments = ["--weights", weights, "--images", str(images), "--annotations", str(annotations), *edges]
    assert main(["eval", *arguments, *where, "--json", str(tmp_path / "figures.json")]) == 0
    assert f"{absent.title():6}       -       -       -" in capsys.readouterr().out
    summary = json.loads((tmp_path / "figures.json").read_text())["summary"]
    assert summary["PQ"] is not None
    assert (summary[f"PQ_{absent}"], "mask_AP" in summary, "mIoU" in summary) == (
        None,
        task == "instance",
        task == "semantic",
    )

    found = tmp_path / "found"
    assert main(["predict", str(images), "--weights", weights, "--out", str(found), *edges, *where]) == 0
    written = json.loads((found / "predictions.json").read_text())
    assert [c["id"] for c in written["categories"]] == [c["id"] for c in categories]
    assert len(written["annotations"]) == len(list(found.glob("*_overlay.png"))) == 3
    quality = pq_compute(annotations, found / "predictions.json")
    assert quality[absent.title()]["n"] == 0
    assert quality["All"]["n"] > 0

    # A network whose predictions have segments, which two steps of training do not give.
    known = model.config.categories
    model = small_model(
        categories=known,
        num_things=len(known.things),
        num_stuff=len(known.stuff),
        instance_score_threshold=0.2,
        rpn_pre_nms_topk=60,
        rpn_post_nms_topk=50,
    ).eval()
    picture = np.asarray(Image.open(images / "001.png"))
    result = Predictor(model, "cpu", short_edge=64)(picture)
    assert result.segments
    assert {segment.isthing for segment in result.segments} == {task == "instance"}
    assert result.draw(picture).size == (80, 48)
    assert result.summary() != "nothing"
    batch = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    [path] = export(model, tmp_path / "net", picture.shape[:2], formats=["export"])
    program = torch.export.load(path).module()
    [padded], [exported], [eager] = (
        unpad(PaddedPanopticFPN(model)(batch)),
        unpad(program(batch)),
        model([*batch]),
    )
    for output in (padded, exported):
        assert torch.equal(output.panoptic, eager.panoptic)
        assert torch.equal(output.segments.label, eager.segments.label)


@pytest.mark.parametrize("categories", [THINGS, STUFF])
def test_the_truth_is_perfect(categories: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    dataset = CocoPanopticDataset(*write_panoptic(tmp_path, categories))
    predictor: Any = TruePredictor(dataset)  # it has both branches, although one of them has no classes
    result = evaluate(predictor, dataset, quiet=True)
    assert len(result["per_class"]) == 2
    for name, value in result["summary"].items():
        assert value == pytest.approx(100) or math.isnan(value), name
    figures = {name for name, value in result["summary"].items() if not math.isnan(value)}
    others = {"mIoU", "fIoU"} if categories is STUFF else {"box_AP", "mask_AP"}
    assert others <= figures
    assert not {"mIoU", "box_AP"} - others & result["summary"].keys()


def test_nothing_could_be_read(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    images, annotations = write_panoptic(tmp_path, THINGS + STUFF)
    dataset = CocoPanopticDataset(images, annotations)
    predictor: Any = TruePredictor(dataset)
    for path in images.iterdir():
        path.unlink()
    result = evaluate(predictor, dataset, quiet=True, skip_bad=True, workers=0)
    assert (result["images"], len(result["skipped"])) == (0, 3)
    assert all(math.isnan(value) for value in result["summary"].values())
    assert "0 images, and 3 that could not be read" in format_table(result)


MANY = [{"id": 1, "name": "thing", "isthing": 1}]
MANY += [{"id": 1000 + i, "name": f"stuff {i}", "isthing": 0} for i in range(300)]
LABELS = (1, 128, 254, 255, 256, 300)


def write_many(root: Path) -> CocoPanopticDataset:
    """Writes images with void and a few of the classes: labels around the limits of 8 bits."""
    chosen = [MANY[0], *(MANY[label] for label in LABELS)]
    images, annotations = write_panoptic(root, chosen)
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({**content, "categories": MANY}))
    return CocoPanopticDataset(images, annotations)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CocoPanopticDataset:
    return write_many(tmp_path_factory.mktemp("many"))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_keeps_many_labels(many: CocoPanopticDataset, workers: int) -> None:
    transform = Compose([Resize([48], 100), Crop((48, 80), 0.5), Flip(0.0)])
    loader = TrainLoader(many, transform, 3, workers=workers)
    [batch] = islice(loader, 1)
    loader.close()
    for target in batch.targets:
        assert set(target.semantic.unique().tolist()) == {IGNORE, 0, *LABELS}
        assert target.semantic.dtype == target.instances.dtype == torch.int16


def test_loss_of_many_labels(many: CocoPanopticDataset) -> None:
    model = small_model(categories=many.categories, num_things=1, num_stuff=300, tasks=("semantic",))
    samples = [many.load(index) for index in range(2)]
    batch = Batch([s.image for s in samples], [make_target(s) for s in samples], [0, 1])
    losses = TrainingNetwork(model, lambda_semantic=1.0, lambda_panoptic=1.0)(*batch)
    prepared = model.prepare(batch.images)
    logits = model.semantic_head(model.features(prepared.images)["semantic"])
    upsampled = F.interpolate(logits, scale_factor=4, mode="bilinear")[:, :, :48, :80]
    truth = torch.stack([target.semantic for target in batch.targets]).long()
    expected = F.cross_entropy(upsampled, truth, ignore_index=IGNORE)
    # The sums of the two are rounded differently.
    torch.testing.assert_close(losses["loss_semantic"], expected, rtol=1e-5, atol=1e-6)
    total(losses).backward()  # type: ignore[no-untyped-call]
    gradient = model.semantic_head.logits.weight.grad
    assert gradient is not None
    assert bool((gradient[list(LABELS)].abs().amax(dim=(1, 2, 3)) > 0).all())


class OneLabelOff(TruePredictor):
    """Predicts the stuff of label 256 as 255."""

    def answer(self, sample: Sample) -> PanopticResult:
        result = super().answer(sample)
        return replace(result, semantic=torch.where(result.semantic == 256, 255, result.semantic))


def test_evaluation_of_many_labels(many: CocoPanopticDataset) -> None:
    predictor: Any = TruePredictor(many)
    result = evaluate(predictor, many, with_ap=False, quiet=True)
    assert set(result["per_class"]) == {"thing", *(f"stuff {label - 1}" for label in LABELS)}
    assert result["summary"]["PQ"] == result["summary"]["mIoU"] == 100
    predictor = OneLabelOff(many)
    result = evaluate(predictor, many, with_ap=False, quiet=True)
    # Labels 255 and 256 have equally many pixels: their IoU are 1/2 and 0.
    assert result["summary"]["mIoU"] == pytest.approx(100 * (len(LABELS) + 1 - 1.5) / (len(LABELS) + 1))


def test_a_network_of_many_labels_predicts_them() -> None:
    model = small_model(num_things=0, num_stuff=300).eval()
    with torch.no_grad():
        model.semantic_head.get_parameter("logits.bias")[299] = 100
    result = Predictor(model, "cpu", short_edge=64)(np.zeros((64, 96, 3), np.uint8))
    assert result.semantic.dtype == torch.int16
    assert [segment.name for segment in result.segments] == ["stuff 299"]


def test_too_many_stuff_classes_are_refused_when_the_data_set_is_opened(tmp_path: Path) -> None:
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": f"stuff {i}", "isthing": 0} for i in range(4096)]
    (tmp_path / "many.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"many\.json: categories: stuff: expected at most 4095"):
        CocoPanopticDataset(tmp_path, tmp_path / "many.json")
    with pytest.raises(ValueError, match="num_stuff: expected at most 4095"):
        PanopticFPN(num_stuff=4096)


def test_many_instances_keep_their_numbers() -> None:
    count = 2**15 + 1
    sample = Sample(
        image=torch.zeros(3, 1, count, dtype=torch.uint8),
        segments=torch.arange(1, count + 1, dtype=torch.int32)[None],
        isthing=torch.ones(count, dtype=torch.bool),
        label=torch.zeros(count, dtype=torch.int64),
        crowd=torch.zeros(count, dtype=torch.bool),
        area=torch.ones(count, dtype=torch.int64),
        image_id=1,
        file_name="many",
    )
    assert torch.equal(make_target(sample).instances, sample.segments)


def test_classes_of_one_name_have_their_own_rows(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "window", "isthing": 1}, {"id": 2, "name": "window", "isthing": 0}]
    dataset = CocoPanopticDataset(*write_panoptic(tmp_path, categories))
    predictor: Any = TruePredictor(dataset)
    result = evaluate(predictor, dataset, with_ap=False, quiet=True)
    assert set(result["per_class"]) == {"window (id 1)", "window (id 2)"}
    assert "window (id 2)  100.00" in format_table(result)
