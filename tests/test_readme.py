"""README.md and docs/performance.md match the committed results and the ops, links resolve, and the example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from support.repository import repository


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch)


def test_figures_match_the_results(root: Path) -> None:
    from benchmarks.scripts.report.pages import performance_page, readme_with_figures
    from benchmarks.scripts.report.results import committed, read_runs

    readme = (root / "README.md").read_text()
    assert "<!-- begin figures: benchmarks/results/" in readme
    advice = "python -m benchmarks.scripts.report rewrites it"
    assert readme_with_figures(readme) == readme, advice
    runs = [run for path in committed() for run in read_runs(path)]
    assert performance_page(runs) == (root / "docs" / "performance.md").read_text(), advice


def test_table_of_ops_is_complete(root: Path) -> None:
    from benchmarks.scripts.report.ops_table import REPLACED, op_names, readme_with_ops

    readme = (root / "README.md").read_text()
    names = op_names()
    assert set(names) >= REPLACED.keys()
    table = readme.split("<!-- begin ops -->")[1].split("<!-- end ops -->")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == names
    assert readme_with_ops(readme) == readme, "python -m benchmarks.scripts.report rewrites it"


def test_links_resolve(root: Path) -> None:
    if not (root / "setup.py").is_file():
        pytest.skip("setup.py is not next to tests/, so the targets of many links are missing")
    pages = [*root.glob("*.md"), root / "benchmarks" / "README.md", root / "csrc" / "README.md"]
    for page in (*pages, *sorted((root / "docs").rglob("*.md"))):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text):
            link = "".join(target).partition("#")[0]
            if link and "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_example_runs(root: Path) -> None:
    section = (root / "README.md").read_text().split("## One op in your own code")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
