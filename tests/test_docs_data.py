"""Every command in docs/data.md runs, on folders that have the names in it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from panfpn_fast.cli.main import main
from support.annotated_folders import WRITERS
from support.repository import repository

for package in ("omegaconf", "pycocotools", "yaml"):
    pytest.importorskip(package)

SHORT = [
    *("data.short_edges=[40,48]", "data.crop=[]", "data.val_short_edge=48", "model.backbone=resnet10_narrow"),
    *("model.fpn_channels=16", "model.semantic_channels=16", "model.semantic_groups=4", "workers=0"),
    *("model.box_head_channels=32", "model.mask_head_channels=16", "model.mask_head_convs=1"),
    *("solver.batch_size=1", "solver.steps=1", "solver.warmup_steps=0", "solver.milestones=[]"),
]


@pytest.mark.usefixtures("one_thread")
def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (repository(monkeypatch) / "docs" / "data.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(commands) > 8
    for name, kind in (
        ("coco", "coco_instances"),
        ("yolo", "yolo"),
        ("labelme", "labelme"),
        ("masks", "masks"),
    ):
        for split in ("train", "val"):
            WRITERS[kind](tmp_path / name, split)
    monkeypatch.chdir(tmp_path)
    for number, command in enumerate(commands):
        program, *arguments = shlex.split(command)
        assert program == "panfpn-fast"
        if arguments[0] == "train":
            # The runs have one folder in the text; the commands after a run use its network.
            if Path("run").exists():
                Path("run").rename(f"run{number}")
            arguments += SHORT
        assert main(arguments) == 0, (command, capsys.readouterr().err)
