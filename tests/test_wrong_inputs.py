"""Every command with wrong inputs: exit status 2 and one short message that names the input, before any work."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import panfpn_fast
from panfpn_fast import PanopticFPN, Predictor
from panfpn_fast.cli.main import _parser, main
from panfpn_fast.data import read_categories
from panfpn_fast.training.config import get_train_preset
from panfpn_fast.training.trainer import Trainer
from support.coco_samples import write_coco

PREDICT = "predict photo.png --weights model.pth --device cpu --out made"
EVAL = "eval --weights model.pth --images photos --annotations truth.json --device cpu --no-ap"
TRAIN = "train --preset tiny --out made --device cpu workers=0"
OWN = "train --preset nuclei --out made --device cpu workers=0 data.images=photos data.annotations=truth.json"
EXPORT = "export model.pth made/net --size 64 64 --format export --device cpu"
DATA = "--images photos --annotations truth.json"
BENCH = "bench --weights model.pth --size 64 64 --device cpu"

# A command, and the part of its message that names the input and what it takes.
CASES = [
    # Options that all commands have.
    *(
        (f"{command} --device {device}", f"device: expected a device of this machine, got '{device}'; it has cpu")
        for command in (PREDICT, EVAL, TRAIN, EXPORT, BENCH)
        for device in ("mps", "0", "meta", "cpu:1", "CPU", "cuda:99")
    ),
    *((f"{command} --nope", "unrecognized arguments: --nope") for command in (PREDICT, EVAL, TRAIN, EXPORT, BENCH)),
    ("", "the following arguments are required: COMMAND"),
    ("paint", "invalid choice: 'paint'"),
    ("info extra", "unrecognized arguments: extra"),
    ("info --device cpu", "unrecognized arguments: --device cpu"),
    # Weights.
    *(
        (command.format(weights), message)
        for command in (
            "predict photo.png --out made --weights {}",
            f"{PREDICT} --semantic-weights {{}}",
            "eval --images photos --annotations truth.json --weights {}",
            "convert {} made/x.pth",
            "export {} made/net --size 64 64",
            "bench --weights {}",
        )
        for weights, message in (
            ("''", "expected the path of a checkpoint or a name, got nothing"),
            ("nope.pth", "nope.pth: no such file; a published checkpoint has a name such as detectron2://"),
            ("photos", "photos: expected a checkpoint file, such as photos/model.pth, got a folder"),
            ("folder", "folder: expected a checkpoint file, such as folder/a.pth, got a folder"),
            ("photo.png", "photo.png: not a checkpoint: expected a pickle, a file of torch.save or"),
            ("https://x.org/a.pth", "https://x.org/a.pth: an address, not a name; download the file and pass its path"),
            ("detectron2://R50", "unknown checkpoint 'detectron2://R50'; similar names: detectron2://"),
            ("panoptic_fpn_r50", "the name of a preset, which has no trained weights"),
        )
    ),
    # Outputs.
    *(
        (
            (f"{PREDICT} --out photo.png", "--out: cannot write to the folder photo.png/predictions"),
            (f"{PREDICT} --out photo.png/x", "--out: cannot write to the folder photo.png/x/predictions"),
            (f"{PREDICT} --out /proc/x", "--out: cannot write to the folder /proc/x/predictions"),
            (f"{PREDICT} --out ''", "--out: expected a path, got nothing"),
            (f"{EVAL} --json folder", "--json: expected the path of a file, got the folder folder"),
            (f"{EVAL} --json photo.png/x", "--json: expected a folder, got the file photo.png"),
            (f"{EVAL} --json /proc/x/y", "--json: cannot write to the folder /proc/x"),
            *(
                (f"{EVAL} {option} {file} --json ./{file}", f"--json: expected another path than {option}, which the")
                for option, file in (("--annotations", "truth.json"), ("--weights", "model.pth"),
                                     ("--semantic-weights", "folder/a.pth"), ("--categories", "three.json"))
            ),
            (f"{EVAL} --json ''", "--json: expected a path, got nothing"),
            (f"{TRAIN} --out photo.png", "out: expected a folder, got the file photo.png"),
            (f"{TRAIN} --out photo.png/x", "out: cannot write to the folder photo.png/x"),
            (f"{TRAIN} --out /proc/x", "out: cannot write to the folder /proc/x"),
            (f"{TRAIN} --out ''", "--out: expected a path, got nothing"),
            (f"{TRAIN} --out taken", "out: expected the path of a file, got the folder taken/model.pth"),
            (f"{TRAIN} --out begun", "out: begun holds the checkpoints of another run; resume it, or give another"),
            (f"{TRAIN} --out begun --resume", "cannot be read as a checkpoint"),
            ("demo --out photo.png", "out: expected a folder, got the file photo.png"),
            ("demo --out photo.png/x", "out: cannot write to the folder photo.png/x"),
            ("demo --out taken", "out: expected the path of a file, got the folder taken/model.pth"),
            ("demo --out ''", "--out: expected a path, got nothing"),
            ("convert model.pth taken/model.pth", "OUT: expected the path of a file, got the folder taken/model.pth"),
            ("convert model.pth photo.png/x.pth", "OUT: expected a folder, got the file photo.png"),
            ("convert model.pth /proc/x/y.pth", "OUT: cannot write to the folder /proc/x"),
            ("convert model.pth ''", "OUT: expected a path, got nothing"),
            ("convert model.pth x.onnx", "x.onnx: a checkpoint in the native layout needs the suffix .safetensors or"),
            ("convert model.pth x.safetensors --to detectron2", "needs the suffix .pkl or .pth"),
            ("export model.pth taken/net --size 64 64", "path: expected the path of a file, got the folder"),
            ("export model.pth photo.png/x --size 64 64", "path: expected a folder, got the file photo.png"),
            ("export model.pth /proc/x/y --size 64 64", "path: cannot write to the folder /proc/x"),
            # Before a download of the weights.
            ("export nope.pth taken/net --size 64 64", "path: expected the path of a file, got the folder"),
            ("export model.pth '' --size 64 64", "NAME: expected a path, got nothing"),
        )
    ),
    *(
        (f"data {action} {DATA} --out {out}", message)
        for action, out, message in (
            *(
                (action, out, message)
                for action in ("check", "show")
                for out, message in (
                    ("photo.png", "--out: expected a folder, got the file photo.png"),
                    ("/proc/x", "--out: cannot write to the folder /proc/x"),
                    ("''", "--out: expected a path, got nothing"),
                )
            ),
            ("convert", "made", "--out: expected a file with the suffix .json, got made"),
            ("convert", "taken/x.json", "--out: expected the path of a file, got the folder taken/x.json"),
            ("convert", "photo.png/x.json", "--out: expected a folder, got the file photo.png"),
            ("convert", "photo.json", "--out: expected a folder, got the file photo"),
            ("convert", "./truth.json", "--out: expected another path than --annotations, which the command reads"),
            ("convert", "photos.json", "the folder of the PNGs: expected another path than --images"),
            ("show", "./photos", "--out: expected another path than --images, which the command reads"),
        )
    ),
    # Arguments that are missing or have wrong values.
    ("data", "the following arguments are required: ACTION"),
    ("data paint", "invalid choice: 'paint'"),
    ("data check", "--images: expected a path, because --kind is coco_panoptic; got nothing"),
    (f"data convert {DATA}", "the following arguments are required: --out"),
    (f"data show {DATA} --out made --only x y", "--only: no file name contains x or y"),
    (f"data check {DATA} --out made --pictures 0", "--pictures: expected a positive whole number, got '0'"),
    (f"data check {DATA} --out made --label-divisor -1", "--label-divisor: expected a whole number from 0 to"),
    (f"data check {DATA} --out made --void-values x", "--void-values: expected a whole number from 0 to"),
    (f"data check {DATA} --out made --classes a a", " classes: expected different names"),
    (f"data check {DATA} --out made --stuff ''", " stuff: expected different names that are not empty"),
    (f"data check {DATA} --out made --background sky", "--background: invalid choice: 'sky'"),
    ("predict", "the following arguments are required: SOURCE"),
    ("eval", "the following arguments are required: --weights"),
    ("eval --weights model.pth", "--images: expected a path, because --kind is coco_panoptic; got nothing"),
    ("eval --weights model.pth --images photos", "--annotations: expected a path, because --kind is coco_panoptic"),
    ("convert model.pth", "the following arguments are required: OUT"),
    ("export --size 64 64", "the following arguments are required: WEIGHTS, NAME"),
    *(
        (f"{command} {option} {value!r}", f"{option}: expected a positive whole number, got {value!r}")
        for command, option in (
            (PREDICT, "--max-edge"), (PREDICT, "--batch-size"), (EVAL, "--max-edge"), ("demo", "--steps"),
            (BENCH, "--batch"), (BENCH, "--runs"), (EXPORT, "--batch"),
        )
        for value in ("0", "-1", "x", "1.5", "")
    ),
    *(
        (f"{command} {option} {value}{more}", f"{option}: expected 1 to 65536 pixels, got {value!r}")
        for command, option, more in (
            (BENCH, "--size", " 64"), (EXPORT, "--size", " 64"), (EXPORT, "--output-size", " 64"),
            (PREDICT, "--short-edge", ""), (EVAL, "--short-edge", ""),
        )
        for value in ("0", "-1", "-1.5", "x", "65537")
    ),
    *(
        (f"{command} {option} {value!r}", f"{option}: expected a whole number from 0 to below 2**63, got {value!r}")
        for command, option in ((EVAL, "--workers"), ("demo", "--workers"), ("demo", "--seed"), (TRAIN, "--subset"))
        for value in ("-1", "x", "", "9223372036854775808")
    ),
    (f"{BENCH} --size 64 -1", "--size: expected 1 to 65536 pixels, got '-1'"),
    (f"{EVAL} --weights nope.pth --workers 257", "workers: expected 0 to 256, got 257"),
    ("demo --workers 257", "workers: expected 0 to 256, got 257"),
    *((f"{PREDICT} --score-threshold {value!r}", f"expected a number from 0 to 1, got {value!r}") for value in
      ("2", "nan", "-0.1", "x", "")),
    *((f"{command} --dtype int8", "--dtype: invalid choice: 'int8'") for command in (PREDICT, EXPORT, BENCH)),
    (f"{BENCH} --preset panoptic_fpn_r50", "--preset: not allowed with argument --weights"),
    ("bench --preset r50", "unknown preset 'r50'; known presets: panoptic_fpn_r50"),
    ("convert model.pth x.pth --to keras", "--to: invalid choice: 'keras'"),
    (f"{EXPORT} --format tflite", "--format: invalid choice: 'tflite'"),
    ("export model.pth made/net --any-size", "--any-size: only --format onnx takes images of any size, got"),
    (f"{EXPORT} --any-size", "--any-size: not allowed with argument --size"),
    ("demo extra", "unrecognized arguments: extra"),
    # Images and annotations.
    *(
        (f"data check --out made --kind {kind} --images {images} --annotations {annotations}", message)
        for kind, images, annotations, message in (
            *(("coco_panoptic", *rest) for rest in (
                ("''", "truth.json", "--images: expected a path, got nothing"),
                ("photos", "''", "--annotations: expected a path, got nothing"),
                ("s3://coco", "truth.json", "--images: expected a path on this machine, got the address"),
                ("photos", "none.json", "--annotations: expected annotated images, got none in none.json"),
            )),
            ("coco_panoptic", "nope", "truth.json", "nope: no such folder; expected the folder of the images"),
            ("coco_panoptic", "photos", "nope.json", "nope.json: no such file"),
            ("coco_instances", "nope", "instances.json", "nope: no such folder; expected the folder of the images"),
            ("coco_instances", "photos", "nope.json", "nope.json: no such file"),
            ("coco_instances", "photos", "folder", "folder: cannot be opened: Is a directory"),
            ("coco_instances", "photos", "photo.png", "photo.png: cannot be read as JSON"),
            ("yolo", "val", "nope.yaml", "nope.yaml: no such file"),
            ("yolo", "val", "folder", "folder: cannot be opened: Is a directory"),
            ("yolo", "val", "photo.png", "photo.png: cannot be read as YAML"),
            ("yolo", "nope", "wrong.yaml", "wrong.yaml:"),
            ("labelme", "photos", "nope", "nope: no such folder; expected the folder of the JSON files"),
            ("labelme", "nope", "labelme", "nope: no such folder; expected the folder of the images"),
            ("labelme", "photos", "photo.png", "photo.png: no such folder; expected the folder of the JSON files"),
            ("labelme", "photos", "empty", "empty: no JSON file in this folder"),
            ("masks", "photos", "nope", "nope: no such folder; expected the folder of the masks"),
            ("masks", "nope", "photos", "nope: no such folder; expected the folder of the images"),
            ("masks", "photos", "photo.png", "photo.png: no such folder; expected the folder of the masks"),
            ("masks", "empty", "photos", "empty: no images in this folder (its subfolders are not searched)"),
            ("cityscapes", "photos", "val", "leftImg8bit/val: no such folder; expected the folder of the images"),
        )
    ),
    ("predict nope.png --out made", "nope.png: no such file"),
    ("predict empty --out made", "empty: no images in this folder (its subfolders are not searched)"),
    ("predict '' --out made", "SOURCE: expected an image, a video or a folder, got nothing"),
    ("predict s3://x/a.png", "expected a path on this machine, or an address that begins with http:// or https://"),
    ("predict 'a*.png' --out made", "a*.png: no image or video has such a name"),
    ("predict photo.png --overlay gif", "--overlay: invalid choice: 'gif'"),
    (f"{EVAL} --images nope", "nope: no such folder; expected the folder of the images"),
    (f"{EVAL} --images photo.png", "photo.png: no such folder; expected the folder of the images"),
    (f"{EVAL} --images ''", "--images: expected a path, got nothing"),
    (f"{EVAL} --images https://x.org/coco", "--images: expected a path on this machine, got the address"),
    (f"{EVAL} --annotations nope.json", "nope.json: no such file"),
    (f"{EVAL} --annotations folder", "folder: cannot be opened: Is a directory"),
    (f"{EVAL} --annotations photo.png", "photo.png: cannot be read as JSON"),
    (f"{EVAL} --annotations alone.json", "alone: no such folder; expected the folder of the panoptic PNGs"),
    (f"{EVAL} --annotations none.json", "--annotations: expected annotated images, got none in none.json"),
    (f"{EVAL} --kind cityscapes", "photos/leftImg8bit/truth.json: no such folder"),
    (f"{EVAL} --kind coco", "--kind: invalid choice: 'coco'"),
    (f"{EVAL} --kind synthetic", "--kind synthetic: the network's classes are truth, not those of the images: 4 thing"),
    *(
        (f"{command} --categories {file}", message)
        for command in (PREDICT, EVAL)
        for file, message in (
            ("nope.json", "nope.json: no such file"),
            ("''", "--categories: expected a path, got nothing"),
            ("photo.png", "photo.png: cannot be read as JSON"),
            ("empty.json", "empty.json: expected a list of categories, or an object with a list 'categories'"),
            ("three.json", "categories: expected 1 thing classes, as many as the network has; 'three' has 2"),
        )
    ),
    # Settings of training.
    *(
        (f"{TRAIN} {setting}", message)
        for setting, message in (
            ("photo.png", "settings: expected NAME=VALUE, such as solver.steps=100, got 'photo.png'"),
            ("solver.steps", "settings: expected NAME=VALUE"),
            ("=3", "settings: expected NAME=VALUE"),
            ("solver.step=3", "solver.step: no such setting; similar ones: solver.steps"),
            ("lr=3", "lr: no such setting; similar ones:"),
            ("model.depth=3", "model.depth: no such setting"),
            ("solver=3", "solver: expected a field and its value, such as solver.steps, got 3"),
            ("data=", "data: expected a field and its value, such as data.kind, got nothing"),
            ("solver.steps=", "solver.steps: expected a whole number, got nothing"),
            ("solver.steps=many", "solver.steps: expected a whole number, got 'many'"),
            ("solver.steps=1.5", "solver.steps: expected a whole number, got 1.5"),
            ("data.flip=", "data.flip: expected a number, got nothing"),
            ("data.flip=often", "data.flip: expected a number, got 'often'"),
            ("skip_bad=maybe", "skip_bad: expected true or false, got 'maybe'"),
            ("data.short_edges=640", "data.short_edges: expected a list of whole numbers, such as [640,800], got 640"),
            ("data.short_edges=[", "data.short_edges: expected a value in YAML, got '['"),
            ("'data.images=${x}'", "data.images: Interpolation key 'x' not found"),
            ("model.backbone=", "model.backbone: expected a value, got nothing"),
            ("model.backbone=vgg:16", "model.backbone: expected one of resnet50"),
            ("model.fpn_channels=0", "model.fpn_channels: expected an integer of at least 1, got 0"),
            ("model.categories=cityscapes", "classes (cityscapes) are not the data set's (synthetic)"),
            ("preset=r50", "unknown preset 'r50'; known presets: panoptic_fpn_r50"),
            ("init=nope.pth", "nope.pth: no such file"),
            ("init=folder", "folder: expected a checkpoint file, such as folder/a.pth, got a folder"),
            ("init=https://x.org/a.pth", "https://x.org/a.pth: an address, not a name; download the file"),
            *(
                (f"{name}={value}", f"{name}: expected")
                for name, values in {
                    "data.kind": ("coco", ""),
                    "data.categories": ("mine",),
                    "data.boxes": ("mine", ""),
                    "data.stuff": ("sky",),
                    "data.classes": ("sky",),
                    "data.label_divisor": ("x",),
                    "data.void_values": (3, "[x]"),
                    "data.synthetic_count": (0, -1),
                    "data.synthetic_val_count": (-1,),
                    "data.short_edges": ("[]", "[0]", "", "[65537]"),
                    "data.max_edge": (0,),
                    "data.crop": ("[64]", "[64,65537]", "[0,64]", "[-8,64]"),
                    "data.crop_most_of_one_class": (2, ".nan"),
                    "data.flip": (2, -1, ".nan"),
                    "data.val_short_edge": (0, 65537),
                    "data.val_max_edge": (0,),
                    "solver.optimizer": ("adam", ""),
                    "solver.steps": (0, -1),
                    "solver.batch_size": (0,),
                    "solver.accumulate": (0, 3),
                    "solver.base_batch_size": (-1,),
                    "solver.learning_rate": (-1, ".nan", ".inf"),
                    "solver.momentum": (-1, 1, ".nan"),
                    "solver.weight_decay": (-1, ".nan"),
                    "solver.warmup_steps": (-5,),
                    "solver.warmup_factor": (-1, ".nan"),
                    "solver.milestones": ("[-1]", "[a]"),
                    "solver.schedule": ("poly", ""),
                    "solver.gamma": (-1, ".inf"),
                    "solver.final_factor": (-1, 2, ".nan"),
                    "solver.clip_gradients": (-1, ".nan"),
                    "solver.ema": (1, -1, ".nan"),
                    "lambda_instance": (-1, ".nan"),
                    "lambda_semantic": (-1, ".inf"),
                    "lambda_panoptic": (-1, ".nan"),
                    "rpn_samples": (1,),
                    "box_samples": (3,),
                    "freeze_at": (-1, 6),
                    "precision": ("fp16", ""),
                    "seed": (-1, 2**63, "1e30"),
                    "workers": (-1, 257),
                    "subset": (-1,),
                    "log_every": (0,),
                    "checkpoint_every": (0,),
                    "evaluate_every": (-1,),
                    "best_by": ("pq", "box_AR"),
                    "early_stop": (-1, 3),
                    "pictures": (-1,),
                    "loggers": ("[comet]", "wandb"),
                }.items()
                for value in values
            ),
        )
    ),
    # The options of `panfpn-fast data` have the names of these settings.
    *(
        (f"{TRAIN} data.{name}={value}", f" {name}: expected")
        for name, value in (
            ("background", "sky"), ("background", ""), ("stuff", "[a,a]"), ("classes", "[a,a]"), ("label_divisor", -1),
        )
    ),
    (f"{TRAIN} data.continuous_edges=true", "data.short_edges: expected [least, most], because data.continuous_edges"),
    (f"{TRAIN} --preset r50", "preset: expected one of 1x, 3x, finetune, cityscapes, tiny, nuclei, got 'r50'"),
    *(
        (f"{TRAIN} --config {file}", message)
        for file, message in (
            ("nope.yaml", "--config: cannot read nope.yaml as YAML"),
            ("folder", "--config: cannot read folder as YAML"),
            ("photo.png", "--config: cannot read photo.png as YAML"),
            ("''", "--config: expected a path, got nothing"),
            ("broken.yaml", "--config: cannot read broken.yaml as YAML: line 3"),
            ("list.yaml", "--config: list.yaml: expected settings, lines 'NAME: VALUE', got [1]"),
            ("misspelt.yaml", "misspelt.yaml: solver.step: no such setting; similar ones: solver.steps"),
            ("wrong.yaml", "wrong.yaml: solver.steps: expected a whole number, got 'many'"),
        )
    ),
    ("train --resume --out nope", "--resume: expected a run in the folder of --out, got no nope/config.json; give the"),
    ("train --preset 1x --out made", "data.images: expected a path, got nothing; set data.images=PATH"),
    *(
        (f"{OWN} {setting}", message)
        for setting, message in (
            ("data.images=nope", "nope: no such folder; expected the folder of the images"),
            ("data.images=s3://coco", "data.images: expected a path on this machine, got 's3://coco'; download"),
            ("data.annotations=", "data.annotations: expected a path, got nothing; set data.annotations=PATH"),
            ("data.annotations=none.json", "data.annotations: expected at least one image, got none: none.json"),
            ("data.annotations=alone.json", "alone: no such folder; expected the folder of the panoptic PNGs"),
            # All of the evaluation is checked before the first step, too.
            ("data.val_images=photos", "data.val_annotations: expected a path, got nothing"),
            ("data.val_images=nope data.val_annotations=truth.json", "nope: no such folder"),
            ("data.val_images=photos data.val_annotations=none.json", "data.val_annotations: expected at"),
            ("data.val_images=photos data.val_annotations=alone.json", "alone: no such folder"),
            ("data.val_images=photos data.val_annotations=nope.json", "nope.json: no such file"),
            ("data.kind=cityscapes data.categories=", "leftImg8bit/truth.json: no such folder"),
        )
    ),
]  # fmt: skip


def write_inputs(root: Path) -> None:
    """Writes the files that the commands name."""
    Image.new("RGB", (64, 48), (90, 120, 30)).save(root / "photo.png")
    for name in (
        "labelme",
        "empty",
        "folder",
        "none",
        "begun",
        "taken/model.pth",
        "taken/net.pt2",
        "taken/x.json",
    ):
        (root / name).mkdir(parents=True)
    (root / "photo").write_text("x")
    (root / "folder" / "a.pth").write_text("x")
    (root / "begun" / "checkpoint_00000001.pth").write_text("x")
    content = write_coco(root)
    categories = content["categories"]
    for name, text in {
        "alone.json": content,
        "none.json": {**content, "images": [], "annotations": []},
        "three.json": [*categories, {"id": 3, "name": "crack", "isthing": 1}],
        "empty.json": {},
        "instances.json": {**content, "annotations": []},
        "labelme/1.json": {
            "imagePath": "1.png",
            "imageHeight": 48,
            "imageWidth": 64,
            "shapes": [{"label": "a", "shape_type": "rectangle", "points": [[0, 0], [9, 9]]}],
        },
    }.items():
        (root / name).write_text(json.dumps(text))
    for name, text in {
        "broken.yaml": "solver:\n  steps: [1\n",
        "list.yaml": "- 1\n",
        "misspelt.yaml": "solver:\n  step: 3\n",
        "wrong.yaml": "solver:\n  steps: many\n",
    }.items():
        (root / name).write_text(text)
    model = PanopticFPN(**get_train_preset("tiny").model, categories=read_categories(root / "truth.json"))
    panfpn_fast.save(model, root / "model.pth")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture
def here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the commands name. Downloads fail."""
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("PANFPN_CACHE", str(inputs / "cache"))
    monkeypatch.setenv("PANFPN_DETECTRON2_URL", "http://127.0.0.1:9")
    return inputs


def run(command: str) -> int | str | None:
    try:
        return main(shlex.split(command))
    except SystemExit as exit:  # argparse
        return exit.code


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the first step, the first prediction and the first export raise an error."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for owner, name in ((Trainer, "_take_step"), (Predictor, "__call__"), (PanopticFPN, "forward")):
        monkeypatch.setattr(owner, name, work)
    monkeypatch.setattr(torch.export, "export", work)


@pytest.mark.usefixtures("here", "no_work")
@pytest.mark.parametrize(("command", "message"), CASES, ids=lambda text: str(text)[-60:])
def test_one_message_names_the_input(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in command and torch.cuda.is_available():
        command, message = command.replace("cuda:99", "tape"), message.replace("cuda:99", "tape")
    assert run(command) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("panfpn-fast")
    # Messages of different classes list both.
    assert len(lines[-1]) <= (400 if "classes" in message else 200) + len("panfpn-fast: ")
    assert len(lines) == 1 or lines[0].startswith("usage: ")  # argparse shows all options above its message
    assert out.count("\n") <= 1  # the line that names the network
    assert not Path("made").exists() or not list(Path("made").rglob("*.*"))


def test_all_commands_are_tried() -> None:
    [commands] = [list(action.choices) for action in _parser()._actions if action.choices]
    assert {command.split(" ")[0] for command, _ in CASES} >= set(commands)


def test_options_and_arguments_in_any_order(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    small = "--device cpu --short-edge 32"
    assert run(f"predict --out {out} photo.png --weights model.pth photos {small}") == 0
    assert len(list(out.glob("*_overlay.png"))) == 2
    assert run(f"convert --to native model.pth {tmp_path}/a/b.pth") == 0
    assert run(f"convert model.pth --to mmdetection {tmp_path}/a/c.pth") == 0
    edges = "data.short_edges=[64] data.val_short_edge=64"
    counts = "data.synthetic_count=2 data.synthetic_val_count=1 solver.batch_size=1"
    assert (
        run(
            f"train {edges} --preset tiny {counts} --out {tmp_path}/run workers=0 --device cpu solver.steps=1"
        )
        == 0
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["solver"]["steps"], config["workers"], config["data"]["short_edges"]) == (1, 0, [64])
    assert (
        run(f"eval --json {tmp_path}/new/figures.json --no-ap --workers 0 {EVAL.removeprefix('eval ')}") == 0
    )
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["images"] == 1
    assert run(f"export --size 64 64 model.pth --format export {tmp_path}/new/programs/net --device cpu") == 0
    assert (tmp_path / "new" / "programs" / "net.pt2").is_file()


def test_empty_values(here: Path, tmp_path: Path) -> None:
    """Settings that may be empty are emptied in the same way on the command line and in a file."""
    from panfpn_fast.training.settings import read_settings

    emptied = ("init", "data.categories", "data.images", "data.val_images", "data.crop", "solver.milestones")
    texts = [f"{name}=" for name in emptied] + ["data.annotations=''", 'data.val_annotations=""', "model={}"]
    file = tmp_path / "empty.yaml"
    file.write_text("init:\ndata: {categories: , images: , val_images: , crop: , annotations: '', val_annotations: }\n"
                    "solver:\n  milestones:\n")  # fmt: skip
    from_texts, from_file = read_settings("nuclei", None, texts[:-1]), read_settings("nuclei", file, [])
    assert from_texts == from_file
    assert (from_texts.init, from_texts.data.crop, from_texts.solver.milestones) == ("", [], [])
    assert from_texts.data.categories == ""
    (tmp_path / "nothing.yaml").write_text("")
    assert read_settings("tiny", tmp_path / "nothing.yaml", []) == get_train_preset("tiny")


def test_a_device_is_not_replaced_by_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.stat("/dev/null")
    assert run(f"{EVAL} --workers 0 --json /dev/null") == 0
    assert os.stat("/dev/null").st_rdev == before.st_rdev


@pytest.mark.parametrize("command", [PREDICT, EVAL])
def test_class_names_from_a_file(
    command: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of detectron2 has no names of classes."""
    weights = tmp_path / "model_final.pth"
    content = panfpn_fast.checkpoints.detectron2.tensors(_resnet())
    torch.save({"model": content}, weights)
    command = command.replace("model.pth", str(weights)).replace("--out made", f"--out {tmp_path}")
    command += " --short-edge 32" + " --workers 0" * command.startswith("eval")
    if command.startswith("eval"):
        assert run(command) == 2
        assert "--categories: expected the classes of the network, because" in capsys.readouterr().err
    assert run(f"{command} --categories truth.json") == 0
    if command.startswith("predict"):
        categories = json.loads((tmp_path / "predictions.json").read_text())["categories"]
        assert [category["name"] for category in categories] == ["cell", "glass"]


def _resnet() -> PanopticFPN:
    return PanopticFPN(backbone="resnet18", fpn_channels=32, num_things=1, num_stuff=1, box_head_channels=16,
                       mask_head_channels=16, semantic_channels=32, semantic_groups=8)  # fmt: skip
