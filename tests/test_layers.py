"""Checks that the picture of the layers in CONTRIBUTING.md equals the contract that import-linter checks."""

from __future__ import annotations

import re

import pytest

from support.processes import ROOT


def test_the_picture_is_the_contract() -> None:
    # importorskip, because mypy checks for Python 3.10, which lacks this module.
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
    with open(ROOT / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = re.search(r"## Layers.*?```text\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    drawn = [re.split(r" {3,}", line)[0] for line in picture.group(1).splitlines()]
    assert drawn == layers
