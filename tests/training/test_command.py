"""`panfpn-fast train` and `demo`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from panfpn_fast.cli import main
from panfpn_fast.training.command import SettingsError, read_settings
from panfpn_fast.training.config import get_train_preset
from panfpn_fast.training.demo import run_demo

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


def test_two_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each trained alone; merged, they are evaluated and predict."""
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
    # The other way round neither has what it should do.
    assert main(["predict", str(image), "--weights", paths[1], "--semantic-weights", paths[0]]) == 2
    assert "instance: expected a network with that branch" in capsys.readouterr().err


def test_begins_with_the_weights_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "a"), *TINY, "solver.steps=1"]) == 0
    init = f"init={tmp_path / 'a' / 'model.pth'}"
    rate = ["solver.learning_rate=0", "solver.steps=1"]
    assert main(["train", "--preset", "tiny", "--out", str(tmp_path / "b"), init, *TINY, *rate]) == 0
    first, second = (torch.load(tmp_path / run / "model.pth", weights_only=True)["model"] for run in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_settings_from_everywhere(tmp_path: Path) -> None:
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
        (["solver.steps=0"], "solver.steps: expected at least 1, got 0"),
        (["model.backbone=keras:vgg"], "backbone: expected one of"),
    ],
)
def test_wrong_settings_are_named(
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
        (["--preset", "4x"], "preset: expected one of 1x, 3x, cityscapes, tiny, nuclei, got '4x'"),
        (["--preset", "1x"], "data.images: is not set"),
        (["--preset", "tiny", "--config", "none.yaml"], "none.yaml"),
        (["--preset", "tiny", "init=none.pth"], "none.pth"),
        (["data.images=none", "data.annotations=none.json"], "none.json"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "omegaconf", None)
    with pytest.raises(SettingsError, match=r"panfpn_fast\[train\]"):
        read_settings("tiny", None, [])


def test_demo_leaves_figures_and_pictures(tmp_path: Path) -> None:
    metrics = run_demo(tmp_path, steps=2, quiet=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics.keys() == {"PQ", "SQ", "RQ", "things", "stuff", "seconds"}
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.size[0] == 3 * 2 * 192
    assert (tmp_path / "model.pth").exists()
