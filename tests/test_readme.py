"""What README.md and docs/performance.md show is what the committed results say, and the example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from repository import repository


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    return repository(monkeypatch)


def test_figures_are_those_of_the_results(root: Path) -> None:
    from benchmarks.report.pages import performance_page, readme_with_figures
    from benchmarks.report.results import committed, read_runs

    readme = (root / "README.md").read_text()
    assert "<!-- Figures of benchmarks/results/" in readme
    advice = "python -m benchmarks.report writes it anew"
    assert readme_with_figures(readme) == readme, advice
    runs = [run for path in committed() for run in read_runs(path)]
    assert performance_page(runs) == (root / "docs" / "performance.md").read_text(), advice


def test_links_lead_somewhere(root: Path) -> None:
    if not (root / "setup.py").is_file():
        pytest.skip("setup.py is not beside tests/: much of what is linked is missing")
    pages = [root / "README.md", root / "CONTRIBUTING.md", root / "benchmarks" / "README.md"]
    for page in (*pages, *sorted((root / "docs").glob("*.md"))):
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
