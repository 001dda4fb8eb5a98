"""Each kind of data is checked, trained on, evaluated, converted and predicted by the documented commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from panfpn_fast import PanopticFPN
from panfpn_fast.checkpoints import detectron2
from panfpn_fast.cli._annotations import KINDS
from panfpn_fast.cli.main import main
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.datasets import FILE_KINDS
from panfpn_fast.data.own_png import plain_name
from panfpn_fast.training.settings import read_settings
from panfpn_fast.training.setup import make_datasets
from support.annotated_folders import CLASSES, HEIGHT, SCENES, WIDTH, WRITERS, save
from support.city_samples import write_city

for package in ("omegaconf", "pycocotools", "yaml"):
    pytest.importorskip(package)

Where = tuple[str, str]
TINY = [
    *("data.short_edges=[48]", "data.val_short_edge=48", "data.val_max_edge=96", "workers=0"),
    *("model.fpn_channels=16", "model.semantic_channels=16", "model.semantic_groups=4"),
    *("model.box_head_channels=32", "model.mask_head_channels=16", "model.mask_head_convs=1"),
    *("solver.batch_size=2", "solver.steps=4", "solver.warmup_steps=0", "solver.milestones=[]"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def write(kind: str, root: Path, split: str) -> Where:
    if kind == "cityscapes":
        write_city(root, {"bonn": ["bonn_0", "bonn_1"]}, split)
        return str(root), split
    return WRITERS[kind](root, split)


def options(kind: str, where: Where) -> list[str]:
    divisor = ["--label-divisor", "1000"] if kind == "masks" else []
    return ["--kind", kind, "--images", where[0], "--annotations", where[1], *divisor]


def train(kind: str, train_data: Where, val_data: Where, out: Path, *settings: str) -> dict[str, Any]:
    """Trains and returns the figures of the last evaluation."""
    names = ("images", "annotations", "val_images", "val_annotations")
    data = [f"data.{name}={value}" for name, value in zip(names, (*train_data, *val_data), strict=True)]
    if kind == "masks":
        data += ["data.label_divisor=1000", f"data.classes=[{','.join(CLASSES)}]"]
    command = ["train", "--preset", "tiny", "--device", "cpu", "--out", str(out), f"data.kind={kind}"]
    assert main([*command, *data, *TINY, *settings]) == 0
    figures: dict[str, Any] = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    return figures


def evaluate(model: Path, out: Path, *arguments: str) -> dict[str, float]:
    command = ["eval", "--weights", str(model), "--device", "cpu", "--json", str(out / "figures.json")]
    assert main([*command, *arguments]) == 0
    summary: dict[str, float] = json.loads((out / "figures.json").read_text())["summary"]
    return summary


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_each_kind_of_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_data, val_data = (write(kind, tmp_path / "data", split) for split in ("train", "val"))
    own = ["--classes", *CLASSES] if kind == "masks" else []
    checked = ["data", "check", *options(kind, train_data), *own, "--out", str(tmp_path / "check")]
    assert main(checked) == 0
    text = capsys.readouterr().out
    images = 2 if kind == "cityscapes" else len(SCENES["train"])
    assert text.startswith(f"{images} images, {WIDTH} to {WIDTH} pixels wide")
    if kind != "cityscapes":
        assert "1 without things; at most 3 instances in one; 0.00% void" in text
        assert [line.split()[1:6] for line in text.splitlines()[2:5]] == [
            ["box", "thing", "2", "2", "0"],
            ["dot", "thing", "2", "3", "0"],
            ["background", "stuff", "3", "3", "0"],
        ]
        assert text.splitlines()[3].endswith("  16..24")
    assert len(list((tmp_path / "check").glob("*.png"))) == images

    figures = train(kind, train_data, val_data, tmp_path / "run")
    model = tmp_path / "run" / "model.pth"
    found = evaluate(model, tmp_path, *options(kind, val_data), "--no-ap")
    assert found == {name: pytest.approx(figures[name], nan_ok=True) for name in found}
    assert found["fIoU"] > 0

    converted = str(tmp_path / "converted.json")
    assert main(["data", "convert", *options(kind, val_data), *own, "--out", converted]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    folder = said.partition("data.images=")[2].split()[0]
    again = evaluate(model, tmp_path, *options("coco_panoptic", (folder, converted)), "--no-ap")
    assert again == {name: pytest.approx(value, nan_ok=True) for name, value in found.items()}

    sample = CocoPanopticDataset(folder, converted).load(0)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())).save(photo)
    assert (
        main(["predict", str(photo), "--weights", str(model), "--out", str(tmp_path), "--device", "cpu"]) == 0
    )
    assert "shorter edge 48" in capsys.readouterr().out
    with Image.open(tmp_path / "photo_overlay.png") as overlay:
        assert overlay.size == (WIDTH, HEIGHT if kind != "cityscapes" else 32)


def test_things_alone(tmp_path: Path) -> None:
    """A Mask R-CNN learns from COCO's instances and has an AP."""
    where = WRITERS["coco_instances"](tmp_path, "train")
    train("coco_instances", where, where, tmp_path / "run", "model.tasks=[instance]")
    summary = evaluate(tmp_path / "run" / "model.pth", tmp_path, *options("coco_instances", where))
    assert {"mask_AP", "box_AP50"} <= summary.keys()
    assert "mIoU" not in summary


def test_things_without_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without stuff the network has only the instance branch, and void is not counted."""
    where = WRITERS["labelme"](tmp_path, "train")
    train("labelme", where, where, tmp_path / "run", "data.background=void")
    capsys.readouterr()
    summary = evaluate(tmp_path / "run" / "model.pth", tmp_path, *options("labelme", where), "--no-ap")
    assert "mIoU" not in summary
    assert "things: box, dot; stuff: none" in capsys.readouterr().out
    assert (
        main(
            [
                "data",
                "check",
                *options("labelme", where),
                "--background",
                "void",
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    assert "78.99% void" in capsys.readouterr().out


def test_yolo_needs_only_data_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        _, data = WRITERS["yolo"](tmp_path, split)
    command = [
        "train",
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
        "data.kind=yolo",
    ]
    assert main([*command, f"data.annotations={data}", *TINY, "solver.steps=1"]) == 0
    assert "PQ " in capsys.readouterr().out
    assert (
        main(["data", "check", "--kind", "yolo", "--annotations", data, "--out", str(tmp_path / "check")])
        == 0
    )
    assert capsys.readouterr().out.startswith("2 images")


def test_other_classes_stop_before_the_first_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = WRITERS["coco_instances"](tmp_path, "train")
    train("coco_instances", where, where, tmp_path / "run", "solver.steps=1")
    path = Path(where[1])
    path.write_text(path.read_text().replace('"dot"', '"ring"'))
    weights = ["--weights", str(tmp_path / "run" / "model.pth"), "--device", "cpu"]
    assert main(["eval", *weights, *options("coco_instances", where)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in (
        "instances_train.json: category 2 is 'ring' (thing), but 'dot' (thing) in the given classes (instances_train).",
        "File: 1 box, 2 ring. Given: 1 box, 2 dot, 3 background (stuff).",
        "Use --weights of a network that was trained on these classes",
    ):
        assert part in message
    assert main(["eval", *weights, *options("cityscapes", where)]) == 2


def test_masks_with_the_classes_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["masks"](tmp_path, "train")
    data = ["data.kind=masks", f"data.images={where[0]}", f"data.annotations={where[1]}"]
    command = ["train", "--preset", "1x", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*command, *data]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "label_divisor: expected at least 1 with 80 classes of things (coco_panoptic), since 0 makes"
        in message
    )
    assert message.endswith("list only one class of things in classes, or give other categories")


def test_masks_are_evaluated_with_the_names_of_their_classes(tmp_path: Path) -> None:
    """The ids of the network's classes are COCO's, those in the masks 1 and 2."""
    where = WRITERS["masks"](tmp_path, "train")
    settings = ("data.categories=coco_panoptic", "data.classes=[car,dog]", "solver.steps=1")
    figures = train("masks", where, where, tmp_path / "run", *settings)
    command = [*options("masks", where), "--no-ap", "--classes", "car", "dog"]
    found = evaluate(tmp_path / "run" / "model.pth", tmp_path, *command)
    assert found == {name: pytest.approx(figures[name], nan_ok=True) for name in found}
    counts = json.loads((tmp_path / "figures.json").read_text())["per_class"]
    assert {name for name, one in counts.items() if one["TP"] + one["FN"]} == {"car", "dog"}


def test_evaluation_can_leave_what_no_annotation_covers_void(tmp_path: Path) -> None:
    """The network has a class "background" of the masks, which need not be what they leave uncovered."""
    where = WRITERS["masks"](tmp_path, "train")
    names = ["data.classes=[box,background]", "data.stuff=[background]", "data.background=void"]
    figures = train("masks", where, where, tmp_path / "run", *names, "solver.steps=1")
    command = [*options("masks", where), "--no-ap"]
    found = evaluate(tmp_path / "run" / "model.pth", tmp_path, *command, "--background", "void")
    assert found == {name: pytest.approx(figures[name], nan_ok=True) for name in found}
    counts = {}
    for background in ("void", "stuff"):
        evaluate(tmp_path / "run" / "model.pth", tmp_path, *command, "--background", background)
        per_class = json.loads((tmp_path / "figures.json").read_text())["per_class"]
        counts[background] = per_class["background"]["TP"] + per_class["background"]["FN"]
    assert counts["void"] < counts["stuff"]


def test_broken_files_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["yolo"](tmp_path, "train")
    labels = tmp_path / "labels" / "train" / "0.txt"
    labels.write_text("1 0.5 0.5 0.2 0.2")
    (tmp_path / "images" / "train" / "2.png").write_bytes(b"no image")
    checked = ["data", "check", *options("yolo", where), "--out", str(tmp_path / "check")]
    assert main(checked) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("1 image, ")
    assert f"{labels}: line 1: expected a class and a polygon, got a box" in captured.err
    assert "2.png: cannot be decoded" in captured.err
    assert "2 of 3 images cannot be read" in captured.err
    out = tmp_path / "new" / "converted.json"
    convert = ["data", "convert", *options("yolo", where), "--out", str(out)]
    assert main(convert) == 2
    assert not out.exists()
    assert main([*convert, "--skip-bad"]) == 1
    assert len(json.loads(out.read_text())["images"]) == 1
    assert main([*convert[:-1], "converted"]) == 2
    assert "--out: expected a file with the suffix .json, got converted" in capsys.readouterr().err


def test_the_printed_settings_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["labelme"](tmp_path / "my data", "train")
    out = tmp_path / "my results" / "converted.json"
    assert main(["data", "convert", *options("labelme", where), "--out", str(out)]) == 0
    said, _, settings = capsys.readouterr().out.strip().partition("; train with: ")
    assert said == "3 images"
    for preset in ("1x", "cityscapes", "tiny", "nuclei"):
        dataset, _ = make_datasets(read_settings(preset, None, shlex.split(settings)).data, 0)
        assert len(dataset) == 3
        assert [category.name for category in dataset.categories.all] == ["box", "dot", "background"]


def test_without_a_readable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["labelme"](tmp_path, "val")
    for image in Path(where[0]).glob("*.png"):
        image.write_bytes(b"no image")
    out = tmp_path / "converted.json"
    assert main(["data", "convert", *options("labelme", where), "--out", str(out), "--skip-bad"]) == 2
    assert f"none of the 2 images can be read; {out} is not written" in capsys.readouterr().err
    assert not out.exists()
    assert main(["data", "check", *options("labelme", where), "--out", str(tmp_path / "check")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 of 2 images cannot be read" in captured.err


def test_a_network_without_names_of_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The remedy of the message works: the JSON of `data convert` has the classes, "background" among them."""
    where = WRITERS["labelme"](tmp_path / "data", "val")
    network = PanopticFPN(backbone="resnet18", fpn_channels=32, num_things=2, num_stuff=1, box_head_channels=16,
                          mask_head_channels=16, semantic_channels=32, semantic_groups=8)  # fmt: skip
    weights = tmp_path / "model_final.pth"
    torch.save({"model": detectron2.tensors(network)}, weights)
    command = [*options("labelme", where), "--no-ap", "--workers", "0", "--short-edge", "32"]
    assert main(["eval", "--weights", str(weights), "--device", "cpu", *command]) == 2
    message = "those of the annotations: --categories the JSON that `panfpn-fast data convert` makes of them"
    assert message in capsys.readouterr().err
    converted = tmp_path / "converted.json"
    assert main(["data", "convert", *options("labelme", where), "--out", str(converted)]) == 0
    evaluate(weights, tmp_path, *command, "--categories", str(converted))


def test_training_skips_damaged_evaluation_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [WRITERS["coco_instances"](tmp_path / split, split) for split in ("train", "val")]
    damaged = tmp_path / "val" / "val" / "1.png"
    damaged.write_bytes(b"no image")
    with pytest.raises(AssertionError):
        train("coco_instances", data[0], data[1], tmp_path / "stopped", "solver.steps=1")
    assert f"{damaged}: cannot be decoded" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"skipped .*1\.png: cannot be decoded"):
        figures = train(
            "coco_instances", data[0], data[1], tmp_path / "run", "solver.steps=1", "skip_bad=true"
        )
    assert "fIoU" in figures


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = WRITERS["labelme"](tmp_path, "train")
    shown = ["data", "show", *options("labelme", where), "--out", str(tmp_path / "shown")]
    assert main([*shown, "--pictures", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"{where[0]}/0.png: background {HEIGHT * WIDTH - 736}, box 480, dot 256 -> {tmp_path / 'shown' / '0.png'}"
    )
    assert second.endswith(f"-> {tmp_path / 'shown' / '1.png'}")
    assert main([*shown, "--only", "2.png"]) == 0
    assert capsys.readouterr().out.startswith(f"{where[0]}/2.png: background {HEIGHT * WIDTH} -> ")
    assert main([*shown, "--only", "missing"]) == 2
    assert "--only: no file name contains missing\n" in capsys.readouterr().err


def test_show_reads_past_damaged_images_of_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = WRITERS["labelme"](tmp_path, "train")
    shown = ["data", "show", *options("labelme", where), "--out", str(tmp_path / "shown")]
    damaged = Path(where[0]) / "0.png"
    damaged.write_bytes(b"no image")
    assert main([*shown, "--only", "2.png"]) == 0
    assert capsys.readouterr().out.startswith(f"{where[0]}/2.png: ")
    for only in ([], ["--only", "/0.png"]):
        assert main([*shown, *only]) == 2
        assert f"{damaged}: cannot be decoded" in capsys.readouterr().err
    assert main([*shown, "--only", "missing"]) == 2
    message = "no file name contains missing. Images that cannot be read: 1; `data check` names them"
    assert message in capsys.readouterr().err


def test_scenes_are_converted_with_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes.json"
    assert main(["data", "convert", "--kind", "synthetic", "--out", str(out)]) == 0
    assert f"50 images; train with: data.images={tmp_path / 'scenes_images'}" in capsys.readouterr().out
    dataset = CocoPanopticDataset(tmp_path / "scenes_images", out)
    assert len(dataset) == 50
    assert dataset.load(3).image.dtype == torch.uint8


def test_names_of_pictures_stay_in_their_folder(tmp_path: Path) -> None:
    assert plain_name("../../etc/pass wd") == "etc_pass_wd"
    assert plain_name("..") == "image"
    images, path = WRITERS["coco_instances"](tmp_path / "data", "val")
    content = json.loads(Path(path).read_text())
    for entry in (*content["images"], *content["annotations"]):
        key = "id" if "file_name" in entry else "image_id"
        entry[key] = {0: "../../a", 1: "..\\a"}[entry[key]]
    Path(path).write_text(json.dumps(content))
    converted = tmp_path / "out" / "b.json"
    assert main(["data", "convert", *options("coco_instances", (images, path)), "--out", str(converted)]) == 0
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
        *("b", "b.json", "b/a.png", "b/a_1.png")
    ]


def test_missing_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (*FILE_KINDS, "synthetic") == KINDS
    for arguments, message in (
        (["--kind", "labelme"], "--images: expected a path, because --kind is labelme; got nothing"),
        (["--kind", "yolo"], "--annotations: expected a path, because --kind is yolo; got nothing"),
        (["--kind", "labelme", "--images", str(tmp_path), "--annotations", "nowhere"], "nowhere: no such"),
    ):
        assert main(["data", "check", *arguments]) == 2
        assert message in capsys.readouterr().err
    save(tmp_path / "a" / "1.png", np.zeros((4, 4), np.uint8))
    both = options("masks", (str(tmp_path / "a"), str(tmp_path / "a")))[:-2]
    assert main(["data", "check", *both, "--out", str(tmp_path / "b")]) == 0
