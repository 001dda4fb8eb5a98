"""`panfpn-fast bench` runs a network and prints the expected lines; the measured times are not checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import panfpn_fast
from panfpn_fast.cli.main import main
from support.training_samples import small_model


def test_prints_each_part_and_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    panfpn_fast.save(small_model(), tmp_path / "model.pth")
    arguments = ["--weights", str(tmp_path / "model.pth"), "--size", "50", "70", "--batch", "2"]
    for runs in ("1", "3"):
        assert main(["bench", *arguments, "--runs", runs, "--device", "cpu"]) == 0
        title, *parts, rate = capsys.readouterr().out.splitlines()
        assert title.startswith(f"{tmp_path / 'model.pth'}, 2 x 50 x 70, float32, cpu, ")
        names = [part.split()[0] for part in parts]
        assert names == ["prepare", "features", "instances", "labels", "merge", "whole"]
        assert all(re.fullmatch(r"\w+ +[\d.]+ ms   \(20 %: [\d.]+, 80 %: [\d.]+\)", part) for part in parts)
        assert re.fullmatch(r"[\d.]+ images/s", rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "r50"], "unknown preset 'r50'; known presets: panoptic_fpn_r50"),
        (["--weights", "missing.pth"], "missing.pth"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
