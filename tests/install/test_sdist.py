"""The source distribution contains everything that a build needs."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

from support.processes import ROOT, run


def test_sdist_has_the_sources(tmp_path: Path) -> None:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("there is no setup.py next to tests/: a source distribution cannot be built")
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is not installed")
    command = ["setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    run([sys.executable, *command], cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "panfpn_fast/py.typed"}
    for folder in ("csrc", "cmake", "tests"):
        files = (
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    assert not wanted - names
