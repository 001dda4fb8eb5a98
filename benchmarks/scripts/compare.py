"""Measures another commit and this working tree: `python -m benchmarks.scripts.compare REV [pytest options]`.

The other commit is built in a temporary worktree. Both the commit and this working tree are installed into temporary
directories and measured, one after the other, by the benchmarks of this working tree. Further options are passed to
pytest, such as `-k nms`, `--full` or `-m cuda`. The build has the requirements of
`pip install --no-build-isolation .`.
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

from .report.results import ROOT

Medians = dict[tuple[str, str], float]


def _run(*command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _install(source: Path, target: Path) -> None:
    """Builds a source tree and installs it into a directory."""
    options = ("--quiet", "--no-build-isolation", "--no-deps")
    _run(sys.executable, "-m", "pip", "install", *options, "--target", target, source)


def _measure(installed: Path, options: list[str]) -> Medians:
    """Runs the benchmarks with the package in a directory; the result lacks the benchmarks that cannot run with it."""
    result = installed.with_suffix(".json")
    # The output of pytest goes to stderr, so that stdout has only the table.
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT),
            *(ROOT / "benchmarks", "--benchmark-only", "-q", f"--benchmark-json={result}"),
            # An older commit lacks modules and ops that the benchmarks import.
            "--continue-on-collection-errors",
            *options,
        ],
        # Python searches the current directory first. The package in the working tree has no binaries, so the command
        # must not run there.
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
    """Formats aligned lines with milliseconds and the speed-up; `-` marks a benchmark that did not run.

    Args:
        before: Median in seconds of each benchmark of the other commit, by group and name.
        after: Median in seconds of each benchmark of the working tree, by group and name.

    Returns:
        A header, the benchmarks in the order of `after`, then the benchmarks that only `before` has.
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
        directory = Path(name)
        tree, before, after = (directory / part for part in ("tree", "before", "after"))
        try:
            _run("git", "worktree", "add", "--quiet", "--detach", tree, revision.revision)
            try:
                _install(tree, before)
            finally:
                _run("git", "worktree", "remove", "--force", tree)
            _install(ROOT, after)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{shlex.join(map(str, error.cmd))} failed; its output is above")
        lines = table(_measure(before, options), _measure(after, options))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
