"""Locates README, documentation and benchmarks for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.processes import ROOT


def repository(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the directory with README.md, docs and benchmarks, and makes `benchmarks` importable.

    Skips the test if they are not next to the tests.
    """
    for name in ("README.md", "docs/performance.md", "benchmarks/scripts/report"):
        if not (ROOT / name).exists():
            pytest.skip(f"{name} is not next to tests/")
    # An entry in sys.path would also expose the source of panfpn_fast, which has no libraries.
    directory = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None
    monkeypatch.setitem(sys.modules, "benchmarks", importlib.util.module_from_spec(spec))
    return ROOT


def load_harness(name: str) -> ModuleType:
    """Imports a file of benchmarks/harness by its path, since benchmarks/ is not installed."""
    folder = ROOT / "benchmarks" / "harness"
    if not folder.is_dir():
        pytest.skip("benchmarks/ is not next to tests/")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up annotations in sys.modules
    spec.loader.exec_module(module)
    return module
