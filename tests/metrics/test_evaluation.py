"""Evaluation from annotated images to metrics: a perfect network, known mistakes, tables, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import panfpn_fast
from panfpn_fast.cli.main import main
from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.sample import Sample
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import process_group
from panfpn_fast.inference import PanopticResult
from panfpn_fast.metrics.evaluation import evaluate
from panfpn_fast.metrics.tables import format_table, without_nan
from support.checkpoint_samples import shared_folder
from support.city_samples import write_city
from support.ranks import run_ranks
from support.true_predictor import TruePredictor

SCENES = SyntheticDataset(6, seed=4, size=(96, 128))


def check_perfect(result: dict[str, Any]) -> None:
    for name, value in result["summary"].items():
        assert value == pytest.approx(100) or (math.isnan(value) and name[-1] in "sml"), name
    for quality in result["per_class"].values():
        assert quality["PQ"] == 100
        assert quality["FP"] == quality["FN"] == 0


def test_the_truth_is_perfect_on_scenes() -> None:
    pytest.importorskip("pycocotools")
    result = evaluate(TruePredictor(SCENES), SCENES, quiet=True)  # type: ignore[arg-type]
    check_perfect(result)
    assert result["images"] == 6
    assert {"PQ", "PQ_things", "RQ_stuff", "mIoU", "mIoU_annotated", "fIoU", "box_AP", "mask_AP50"} <= result[
        "summary"
    ].keys()
    assert "iIoU" not in result["summary"]
    assert sum(quality["TP"] for quality in result["per_class"].values()) == sum(
        int((torch.bincount(SCENES.load(i).segments.flatten(), minlength=2)[1:] > 0).sum()) for i in range(6)
    )


def test_the_truth_is_perfect_on_photographs() -> None:
    pytest.importorskip("pycocotools")
    root = shared_folder() / "coco_sample"
    if not root.is_dir():
        pytest.skip(f"{root.parent} has no goldens")
    dataset = CocoPanopticDataset(root / "images", root / "panoptic.json", categories="coco_panoptic")
    check_perfect(evaluate(TruePredictor(dataset), dataset, quiet=True))  # type: ignore[arg-type]


@pytest.fixture
def city(tmp_path: Path) -> CityscapesDataset:
    write_city(tmp_path, {"bonn": ["bonn_0", "bonn_1", "bonn_2"]})
    return CityscapesDataset(tmp_path, "val")


def test_the_truth_is_perfect_on_streets(city: CityscapesDataset) -> None:
    pytest.importorskip("pycocotools")
    result = evaluate(TruePredictor(city), city, quiet=True)  # type: ignore[arg-type]
    check_perfect(result)
    assert result["summary"]["iIoU"] == 100
    assert set(result["per_class"]) == {"car", "road", "sky"}  # a group of persons does not count


class Mistaken(TruePredictor):
    """Misses the first thing of each image."""

    def answer(self, sample: Sample) -> PanopticResult:
        result = super().answer(sample)
        missed = next(segment for segment in result.segments if segment.isthing)
        panoptic = torch.where(result.panoptic == missed.id, 0, result.panoptic)
        rest = [segment for segment in result.segments if segment is not missed]
        return replace(result, panoptic=panoptic, segments=rest)


def test_a_missed_car_is_counted(city: CityscapesDataset) -> None:
    result = evaluate(Mistaken(city), city, with_ap=False, quiet=True)  # type: ignore[arg-type]
    car = result["per_class"]["car"]
    assert (car["TP"], car["FP"], car["FN"]) == (3, 0, 3)
    assert car["RQ"] == pytest.approx(100 * 3 / 4.5)
    # Both instances have the same weight, regardless of their sizes.
    assert result["summary"]["iIoU"] == pytest.approx(50)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_single_tasks_have_only_their_own_metrics(task: str) -> None:
    pytest.importorskip("pycocotools")
    predictor: Any = TruePredictor(SCENES)
    predictor.tasks = (task,)
    result = evaluate(predictor, SCENES, quiet=True)
    assert ("mask_AP" in result["summary"]) == (task == "instance")
    assert ("mIoU" in result["summary"]) == (task == "semantic")
    assert ("Mask" in format_table(result)) == (task == "instance")


def test_result_does_not_depend_on_workers() -> None:
    predictor: Any = Mistaken(SCENES)
    alone = evaluate(predictor, SCENES, with_ap=False, quiet=True, workers=0)
    assert evaluate(predictor, SCENES, with_ap=False, quiet=True, workers=2) == alone


@pytest.mark.parametrize("count", [2, 4])
def test_result_does_not_depend_on_the_number_of_processes(
    city: CityscapesDataset, tmp_path: Path, count: int
) -> None:
    pytest.importorskip("pycocotools")
    predictor: Any = Mistaken(city)
    alone = evaluate(predictor, city, quiet=True)

    def run(rank: int) -> None:
        with process_group("cpu"):
            result = evaluate(predictor, city, quiet=True)
        (tmp_path / f"{rank}.json").write_text(json.dumps(without_nan(result)))

    run_ranks(count, run)  # with four processes, one has no image
    for rank in range(count):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == without_nan(alone)


def test_damaged_image_is_an_error_or_skipped(city: CityscapesDataset, tmp_path: Path) -> None:
    predictor: Any = TruePredictor(city)
    missing = tmp_path / "gtFine" / "val" / "bonn" / "bonn_1_gtFine_instanceIds.png"
    missing.unlink()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S*bonn_1_gtFine_instanceIds.png: no such file$"):
            evaluate(predictor, city, with_ap=False, quiet=True, workers=workers)
    result = evaluate(predictor, city, with_ap=False, quiet=True, skip_bad=True)
    assert result["images"] == 2
    assert result["skipped"] == [f"{missing}: no such file"]
    assert f"2 images, and 1 that could not be read:\n{missing}" in format_table(result)


def test_other_classes_and_no_images(city: CityscapesDataset) -> None:
    predictor: Any = TruePredictor(city)
    with pytest.raises(
        ValueError,
        match=r"dataset: its classes \(synthetic\) are not the network's \(cityscapes\): 4 thing classes",
    ):
        evaluate(predictor, SCENES)
    with pytest.raises(ValueError, match="dataset: there are no images"):
        evaluate(TruePredictor(SCENES), SyntheticDataset(0))  # type: ignore[arg-type]


def test_table_shows_classes_that_were_missed() -> None:
    result = evaluate(TruePredictor(SCENES), SCENES, with_ap=False, quiet=True)  # type: ignore[arg-type]
    result["per_class"]["disk"] = {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0, "TP": 0, "FP": 0, "FN": 3}
    lines = format_table(result).splitlines()
    assert lines[0].split() == ["PQ", "SQ", "RQ"]
    assert [line.split()[0] for line in lines[1:4]] == ["All", "Things", "Stuff"]
    assert "disk" in {line.split()[0] for line in lines if line.endswith("0       0       3")}
    assert len({len(line) for line in lines[1:4]}) == 1


def test_missing_metrics_are_null_in_json() -> None:
    figures = {"a": math.nan, "b": [1.5, math.nan], "c": {"d": 3, "e": "nan"}}
    text = json.dumps(without_nan(figures), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": 3, "e": "nan"}}


def test_ap_needs_all_instances() -> None:
    predictor: Any = TruePredictor(SCENES)
    predictor.instances = "panoptic"
    with pytest.raises(ValueError, match=r"predictor: AP counts all instances, .*pass with_ap=False"):
        evaluate(predictor, SCENES, quiet=True)
    assert evaluate(predictor, SCENES, with_ap=False, quiet=True)["summary"]["PQ"] == 100


def run_eval(monkeypatch: pytest.MonkeyPatch, predictor: TruePredictor, *arguments: str | Path) -> int:
    monkeypatch.setattr(panfpn_fast, "load", lambda weights: None)
    monkeypatch.setattr(panfpn_fast.inference, "Predictor", lambda model, device, **edges: predictor)
    return main(["eval", "--weights", "none", "--device", "cpu", *map(str, arguments)])


def test_command_on_cityscapes(
    city: CityscapesDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pycocotools")
    predictor = TruePredictor(city)
    where = ("--kind", "cityscapes", "--images", tmp_path, "--annotations", "val")
    assert run_eval(monkeypatch, predictor, *where, "--json", tmp_path / "out.json") == 0
    assert "All     100.00  100.00  100.00" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert found["summary"]["PQ"] == 100
    assert found["summary"]["mask_APl"] is None  # no car is larger than 96 x 96

    truth = tmp_path / "gtFine" / "val" / "bonn" / "bonn_1_gtFine_instanceIds.png"
    truth.unlink()
    assert run_eval(monkeypatch, predictor, *where, "--no-ap") == 2
    assert capsys.readouterr().err.endswith(f"panfpn-fast: {truth}: no such file\n")
    assert run_eval(monkeypatch, predictor, *where, "--no-ap", "--skip-bad") == 0


def test_command_names_what_is_wrong(
    city: CityscapesDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, message in (
        (
            ["--images", tmp_path],
            "--annotations: expected a path, because --kind is coco_panoptic; got nothing",
        ),
        (["--images", tmp_path, "--annotations", tmp_path / "no.json"], "no.json: no such file"),
        (
            ["--kind", "cityscapes", "--images", tmp_path, "--annotations", "test"],
            "test: no such folder; expected the folder of the images",
        ),
        (
            ["--kind", "synthetic"],
            "--kind synthetic: the network's classes are cityscapes, not those of the images: 4 thing classes instead "
            "of 8. Data: 1 disk, 2 box, 3 triangle, 4 ring and 4 more. Network: 24 person, 25 rider, 26 car, 27 truck "
            "and 15 more. Use --weights of a network that was trained on these classes",
        ),
    ):
        assert run_eval(monkeypatch, TruePredictor(city), *arguments) == 2
        assert capsys.readouterr().err.strip().endswith(message)
    assert run_eval(monkeypatch, TruePredictor(city), "--kind", "synthetic", "--device", "toaster") == 2
    assert "device: expected a device of this machine, got 'toaster'" in capsys.readouterr().err
