"""The files of a release state one version."""

from __future__ import annotations

import re

import pytest

from support.processes import ROOT


@pytest.mark.parametrize(
    ("name", "pattern"), [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\d[\w.]*)")]
)
def test_version(name: str, pattern: str) -> None:
    if not (ROOT / name).is_file():
        pytest.skip(f"{name} is not next to tests/")
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    stated = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    assert project is not None
    assert stated is not None
    assert stated[1] == project[1]
