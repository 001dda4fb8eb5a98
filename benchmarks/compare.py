"""Measures another commit and this working tree: `python -m benchmarks.compare REV [pytest options]`.

The other commit is built in a throw-away worktree and installed into a throw-away folder; both are measured by the
benchmarks of this working tree, in turn, on the same machine. Options go to pytest: `-k nms`, `--full`, `-m cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

Medians = dict[tuple[str, str], float]


def _run(command: list[str], **variables: str) -> None:
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)


def _install(source: Path, target: Path) -> None:
    """Builds a source tree and installs it into a folder."""
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--target", str(target)]
    _run([sys.executable, "-m", "pip", "install", *options, str(source)])


def _measure(installed: Path, options: list[str], result: Path) -> Medians:
    """Runs the benchmarks with the package in a folder; those that it cannot run are missing from the result."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", *options]
    # Some rows may fail: an older commit lacks ops that are timed today.
    subprocess.run(
        [*command, f"--benchmark-json={result}"],
        cwd=ROOT,
        # Before the working tree, whose package has no libraries, or others.
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if not result.exists() or not result.read_text():
        return {}
    rows = json.loads(result.read_text())["benchmarks"]
    return {(row["group"], row["name"]): row["stats"]["median"] for row in rows}


def table(before: Medians, after: Medians) -> list[str]:
    """Lines for every benchmark that both could run: milliseconds, and how many times as fast it is now."""
    common = [key for key in after if key in before]
    width = max((len(f"{group}  {name}") for group, name in common), default=0)
    lines = [f"{'':{width}}  {'before ms':>10}  {'now ms':>10}  {'speed-up':>8}"]
    for key in common:
        ratio = before[key] / after[key]
        label = "  ".join(key)
        lines.append(f"{label:{width}}  {1e3 * before[key]:10.3f}  {1e3 * after[key]:10.3f}  {ratio:8.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="a commit, such as HEAD~3 or a tag")
    revision, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = folder / "tree"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(tree), revision.revision])
        try:
            _install(tree, folder / "before")
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)])
        _install(ROOT, folder / "after")
        before, after = (
            _measure(folder / which, options, folder / f"{which}.json") for which in ("before", "after")
        )
    print("\n".join(table(before, after)))


if __name__ == "__main__":
    main()
