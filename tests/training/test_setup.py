"""The commands `panfpn-fast train` and `panfpn-fast demo`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import panfpn_fast
from panfpn_fast._errors import UserError
from panfpn_fast.cli.main import main
from panfpn_fast.data.sample import make_target, segment_boxes
from panfpn_fast.inference import Predictor
from panfpn_fast.training.config import DataConfig, TrainConfig, get_train_preset
from panfpn_fast.training.settings import read_settings
from panfpn_fast.training.setup import make_datasets
from panfpn_fast.training.trainer import make_transform
from support.training_samples import make_sample

TINY = [
    "data.synthetic_val_count=2",
    "data.short_edges=[64]",
    "data.val_short_edge=64",
    "model.fpn_channels=16",
    "model.semantic_channels=16",
    "model.semantic_groups=4",
    "solver.batch_size=1",
    "solver.warmup_steps=0",
    "workers=0",
]


@pytest.fixture(autouse=True)
def needs_omegaconf() -> None:
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")


def test_trains_resumes_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "--preset", "tiny", "--out", str(out), "--device", "cpu", "--subset", "2", *TINY]
    assert main([*command, "solver.steps=1"]) == 0
    assert main([*command, "solver.steps=2", "--resume"]) == 0
    assert "PQ " in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["subset"] == 2
    assert config["data"]["short_edges"] == [64]
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 48), (90, 120, 30)).save(image)
    assert main(["predict", str(image), "--weights", str(out / "model.pth"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "image_overlay.png").exists()


def test_a_network_knows_how_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented commands reach the figures of the run, with `model.pth` and with the run's checkpoints."""
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    edges = ["data.synthetic_val_count=50", "data.val_short_edge=48", "data.val_max_edge=96"]
    settings = [*TINY, *edges, "solver.steps=3", "solver.ema=0.5"]
    assert main(["train", "--preset", "tiny", "--out", str(out), "--device", "cpu", *settings]) == 0
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])

    def figures_of(weights: str, *more: str) -> dict[str, float]:
        command = ["eval", "--kind", "synthetic", "--no-ap", "--device", "cpu", "--json", str(figures)]
        assert main([*command, "--weights", str(out / weights), *more]) == 0
        summary: dict[str, float] = json.loads(figures.read_text())["summary"]
        return summary

    capsys.readouterr()
    found = figures_of("model.pth")
    said = "shorter edge 48, longer edge at most 96 pixels; Categories('synthetic', things: disk"
    assert f"{out / 'model.pth'}: {said}" in capsys.readouterr().out
    assert found == {name: last[name] for name in found}
    assert found["mIoU"] > 0
    assert figures_of("checkpoint_00000003.pth") == found
    assert figures_of("model.pth", "--short-edge", "96") != found

    image = tmp_path / "image.png"
    Image.new("RGB", (128, 96), (90, 120, 30)).save(image)
    model = str(out / "model.pth")
    assert main(["predict", str(image), "--weights", model, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert said in capsys.readouterr().out
    predictor = Predictor(panfpn_fast.load(model), "cpu")
    assert (predictor.short_edge, predictor.max_edge) == (48, 96)
    assert main(["bench", "--weights", model, "--runs", "1", "--device", "cpu"]) == 0
    assert f"{model}, 1 x 48 x 72, float32" in capsys.readouterr().out


def test_two_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two networks are trained separately, and then evaluated and used for prediction together."""
    paths = []
    for task in ("instance", "semantic"):
        out = tmp_path / task
        settings = [*TINY, "solver.steps=1", f"model.tasks=[{task}]"]
        assert main(["train", "--preset", "tiny", "--out", str(out), "--device", "cpu", *settings]) == 0
        paths.append(str(out / "model.pth"))
    both = ["--weights", paths[0], "--semantic-weights", paths[1], "--device", "cpu", "--short-edge", "64"]
    figures = tmp_path / "figures.json"
    assert main(["eval", "--kind", "synthetic", "--json", str(figures), *both]) == 0
    summary = json.loads(figures.read_text())["summary"]
    assert {"PQ", "PQ_things", "mIoU", "mask_AP"} <= summary.keys()
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 48), (90, 120, 30)).save(image)
    assert main(["predict", str(image), "--out", str(tmp_path), *both]) == 0
    # With the weights swapped, neither network has the task that it is used for.
    assert main(["predict", str(image), "--weights", paths[1], "--semantic-weights", paths[0]]) == 2
    assert "instance: expected a network with the task" in capsys.readouterr().err


def test_starts_from_the_weights_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "a"), *TINY, "solver.steps=1"]) == 0
    init = f"init={tmp_path / 'a' / 'model.pth'}"
    rate = ["solver.learning_rate=0", "solver.steps=1"]
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "b"), init, *TINY, *rate]) == 0
    first, second = (torch.load(tmp_path / run / "model.pth", weights_only=True)["model"] for run in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_boxes_of_the_annotation_or_of_the_mask() -> None:
    random = np.random.default_rng(0)
    sample = make_sample(64, 96)
    targets = [
        make_target(
            make_transform(DataConfig(short_edges=[41], flip=0.0, **options), "detectron2")(sample, random)
        )
        for options in ({}, {"boxes": "mask"}, {"crop": [41, 62]})
    ]
    scaled = segment_boxes(sample.segments, len(sample.label))[0][2:] * torch.tensor([62 / 96, 41 / 64] * 2)
    torch.testing.assert_close(targets[0].boxes, scaled.float())
    assert torch.equal(targets[1].boxes, targets[1].boxes.round())
    assert torch.equal(targets[2].boxes, targets[1].boxes)


def test_settings_from_preset_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("solver:\n  learning_rate: 0.5\n  steps: 7\nmodel:\n  backbone: resnet101\n")
    config = read_settings("3x", file, ["solver.steps=8", "data.images=somewhere"])
    assert (config.solver.learning_rate, config.solver.steps, config.solver.batch_size) == (0.5, 8, 16)
    assert config.model == {"backbone": "resnet101"}
    assert config.data.images == "somewhere"
    assert get_train_preset("3x").solver.steps == 270_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["solver.rate=3"], "rate"),
        (["solver.steps=many"], "many"),
        (["precision=float8"], "precision: expected one of float32, bfloat16, float16, got 'float8'"),
        (["model.short_edge=64"], "model.short_edge: expected data.val_short_edge instead"),
        (["solver.steps=0"], "solver.steps: expected at least 1, got 0"),
        (["data.boxes=tight"], "data.boxes: expected one of annotation, mask, got 'tight'"),
        (
            ["data.categories=coco"],
            "data.categories: expected one of cityscapes, coco_panoptic, synthetic, or nothing for the classes that "
            "the annotations list, got 'coco'",
        ),
        (
            ["model.categories=cityscapes"],
            "classes (cityscapes) are not the data set's (synthetic): 4 thing classes instead of 8. Data: 1 disk",
        ),
        (["model.num_things=3"], "num_things: expected 4, as many as categories ('synthetic') has, got 3"),
        (["model.backbone=keras:vgg"], "backbone: expected one of"),
    ],
)
def test_wrong_settings_are_reported(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "out"), *settings]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "4x"], "preset: expected one of 1x, 3x, finetune, cityscapes, tiny, nuclei, got '4x'"),
        (["--preset", "1x"], "data.images: expected a path, got nothing"),
        (["--preset", "tiny", "--config", "none.yaml"], "none.yaml"),
        (["--preset", "tiny", "init=none.pth"], "none.pth"),
        (["data.images=none", "data.annotations=none.json"], "none.json"),
    ],
)
def test_missing_arguments_and_files_are_reported(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_both_data_sets_have_the_same_classes(tmp_path: Path) -> None:
    category = {"id": 1, "name": "cell", "isthing": 1}
    for name, second in (("train", "glass"), ("val", "glass"), ("other", "wall")):
        stuff = {"id": 2, "name": second, "isthing": 0}
        (tmp_path / name).mkdir()
        content = {
            "images": [{"id": 1, "file_name": "1.png"}],
            "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}],
            "categories": [category, stuff],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = {name: str(tmp_path / f"{name}.json") for name in ("train", "val", "other")}
    folder = str(tmp_path)
    data = DataConfig(images=folder, annotations=paths["train"], val_images=folder, categories="")
    dataset, held_out = make_datasets(dataclasses.replace(data, val_annotations=paths["val"]), 0)
    assert held_out is not None
    assert held_out.categories is dataset.categories
    assert dataset.categories.name == "train"
    with pytest.raises(
        UserError,
        match=r"other\.json: category 2 is 'wall' \(stuff\), but 'glass' \(stuff\) in the given classes \(train\)\. "
        r"File: 1 cell, 2 wall\. Given: 1 cell, 2 glass \(stuff\)\. Give data\.val_annotations the classes of",
    ):
        make_datasets(dataclasses.replace(data, val_annotations=paths["other"]), 0)
    named = dataclasses.replace(data, categories="coco_panoptic")
    with pytest.raises(
        UserError,
        match=r"train\.json: category 1 is 'cell' \(thing\), but 'person' \(thing\) in the given classes.*"
        r"File: 1 cell, 2 glass\. Given: 1 person, .* and 129 more\. .* set data\.categories=''",
    ):
        make_datasets(named, 0)


def test_labels_that_data_classes_lacks(tmp_path: Path) -> None:
    """The remedy names the setting that helps: data.categories is empty already."""
    shape = {"label": "b", "shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
    (tmp_path / "1.json").write_text(json.dumps({"imagePath": "1.png", "shapes": [shape]}))
    folder = str(tmp_path)
    data = DataConfig(kind="labelme", images=folder, annotations=folder, classes=["a"])
    with pytest.raises(UserError, match=r"'b' is not among the given classes .*\. Add it to data\.classes$"):
        make_datasets(data, 0)
    assert len(make_datasets(dataclasses.replace(data, classes=["a", "b"]), 0)[0]) == 1


def test_data_sets_without_images_are_refused_before_training(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "cell", "isthing": 1}]
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": []}
    content = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "annotations": [annotation],
        "categories": categories,
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    one, none = str(tmp_path / "one.json"), str(tmp_path / "none.json")
    for name in ("one", "none"):
        (tmp_path / name).mkdir()
    folder = str(tmp_path)
    data = DataConfig(images=folder, annotations=one, val_images=folder, val_annotations=none, categories="")
    with pytest.raises(
        UserError, match=r"data\.val_annotations: expected at least one image, got none: .*none\.json"
    ):
        make_datasets(data, 0)
    with pytest.raises(
        UserError, match=r"data\.annotations: expected at least one image, got none: .*none\.json"
    ):
        make_datasets(dataclasses.replace(data, annotations=none), 0)
    scenes = DataConfig(kind="synthetic", synthetic_count=0, synthetic_val_count=0)
    with pytest.raises(UserError, match=r"data\.synthetic_count: expected at least one image, got none: 0"):
        make_datasets(scenes, 0)
    assert make_datasets(dataclasses.replace(scenes, synthetic_count=1), 0)[1] is None


def test_only_presets_for_coco_name_its_classes() -> None:
    for preset, categories in (
        ("1x", "coco_panoptic"),
        ("3x", "coco_panoptic"),
        ("nuclei", ""),
        ("tiny", ""),
    ):
        assert get_train_preset(preset).data.categories == categories
    assert TrainConfig().data.categories == ""


def test_without_omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", None)
    with pytest.raises(UserError, match=r'pip install "\.\[train\]"'):
        read_settings("tiny", None, [])
