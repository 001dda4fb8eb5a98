"""Writes tables and plots from results: `python -m benchmarks.scripts.report [RESULTS_JSON ...] [--out FOLDER]`.

Without arguments it writes docs/performance.md and its plots from all of benchmarks/results, README's figures from the
file that its marker names, and README's table of ops from `panfpn_fast.ops`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from .ops_table import readme_with_ops
from .pages import IMAGES, performance_page, readme_with_figures
from .results import ROOT, ResultsError, committed, read_runs


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS_JSON", help="files that pytest-benchmark wrote"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write performance.md and images to this directory, and leave README.md unchanged",
    )
    arguments = parser.parse_args()
    try:
        from .plots import draw
    except ModuleNotFoundError as error:
        print(f'The plots need matplotlib: pip install ".[bench]" ({error})', file=sys.stderr)
        return 1
    readme = ROOT / "README.md"
    try:
        runs = [run for path in arguments.results or committed() for run in read_runs(path)]
        text = readme_with_ops(readme_with_figures(readme.read_text()))
    except (ResultsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    out: Path = arguments.out or ROOT / "docs"
    out.mkdir(parents=True, exist_ok=True)
    if arguments.out is None:
        # Plots of deleted results are deleted too.
        shutil.rmtree(out / IMAGES, ignore_errors=True)
    for run in runs:
        draw(run, out / IMAGES / run.name)
    (out / "performance.md").write_text(performance_page(runs))
    if arguments.out is None:
        readme.write_text(text)
    print(f"{out / 'performance.md'}: {len(runs)} runs, {sum(len(run.groups) for run in runs)} cases")
    return 0


sys.exit(main())
