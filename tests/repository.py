"""Where tests of README, documentation and benchmarks find them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def repository(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with README.md, docs and benchmarks, whose `benchmarks` can be imported from now on.

    Skips the test where the tests stand without them.
    """
    for name in ("README.md", "docs/performance.md", "benchmarks/report"):
        if not (ROOT / name).exists():
            pytest.skip(f"{name} is not beside tests/")
    # By sys.path the package without its libraries, which lies there too, would be found as well.
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    monkeypatch.setitem(sys.modules, "benchmarks", importlib.util.module_from_spec(spec))
    return ROOT
