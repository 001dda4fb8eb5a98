"""Measures another commit and this working tree: `python -m benchmarks.compare REV [pytest options]`.

The other commit is built in a throw-away worktree and installed into a throw-away folder, and so is this working tree;
both are measured by the benchmarks of this working tree, one after the other. Options go to pytest: `-k nms`, `--full`,
`-m cuda`. The build needs what `pip install --no-build-isolation .` does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

Medians = dict[tuple[str, str], float]


def _run(*command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _install(source: Path, target: Path) -> None:
    """Builds a source tree and installs it into a folder."""
    options = ("--quiet", "--no-build-isolation", "--no-deps")
    _run(sys.executable, "-m", "pip", "install", *options, "--target", target, source)


def _measure(installed: Path, options: list[str]) -> Medians:
    """Runs the benchmarks with the package in a folder; those that it cannot run are missing from the result."""
    result = installed.with_suffix(".json")
    # What pytest tells of failures and progress goes beside the table, to stderr.
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT),
            *(ROOT / "benchmarks", "--benchmark-only", "-q", f"--benchmark-json={result}"),
            # An older commit lacks modules and ops that are timed today.
            "--continue-on-collection-errors",
            *options,
        ],
        # Python looks for modules there first; in the working tree lies the package without its libraries.
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        stdout=sys.stderr,
        check=False,
    )
    if not result.exists() or not result.read_text():
        return {}
    rows = json.loads(result.read_text())["benchmarks"]
    return {(row["group"], row["name"]): row["stats"]["median"] for row in rows}


def table(before: Medians, after: Medians) -> list[str]:
    """Aligned lines: milliseconds, and how many times as fast it is now; `-` where one of the two did not run.

    Args:
        before: Median in seconds of each benchmark, by its group and name.
        after: The same of the working tree.

    Returns:
        A header, then the benchmarks in the order of `after`, then those that `before` alone has.
    """
    lines = [("", "before ms", "now ms", "speed-up")]
    for key in dict.fromkeys([*after, *before]):
        times = [f"{1e3 * medians[key]:.3f}" if key in medians else "-" for medians in (before, after)]
        ratio = f"{before[key] / after[key]:.2f}" if key in before and key in after else "-"
        lines.append(("  ".join(key), times[0], times[1], ratio))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="a commit, such as HEAD~3 or a tag")
    revision, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree, before, after = (folder / part for part in ("tree", "before", "after"))
        try:
            _run("git", "worktree", "add", "--quiet", "--detach", tree, revision.revision)
            try:
                _install(tree, before)
            finally:
                _run("git", "worktree", "remove", "--force", tree)
            _install(ROOT, after)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{shlex.join(map(str, error.cmd))} failed, see above")
        lines = table(_measure(before, options), _measure(after, options))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
