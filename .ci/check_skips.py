"""Fails if tests were skipped for a reason that CI does not expect: a skip must not hide a missing dependency.

    python .ci/check_skips.py JUNIT.xml ...
    python .ci/check_skips.py --list-missing JUNIT.xml

The first form reads the reports of several runs in one environment. A test that ran in one of them was not skipped. The
second form prints the tests that were skipped because a package is not installed, for a run with more packages.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

EXPECTED = (
    r"torch finds no CUDA GPU here",
    r"float64 is tested on the CPU only",
    r"the configuration is for other GPUs",  # Triton configurations for certain GPUs
    r"timm is not installed",  # the tests of backbones use torchvision's
    r"detectron2 is not installed",  # not on PyPI for every torch; the tests of replacements do without
    r"mmdetection is not installed",
    r"has no goldens",  # PANFPN_SHARED is not available everywhere
)
MISSING = r"is not installed"


def cases(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yields the node id of each test in a report of pytest, and the reason if the test was skipped.

    If a whole file was skipped, the node id is the file's.
    """
    for case in ElementTree.parse(path).iter("testcase"):
        file, where = case.get("file", ""), case.get("classname", "")
        classes = where.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
        name = case.get("name", "") if where else ""
        skipped = case.find("skipped")
        reason = None if skipped is None else f"{skipped.get('message', '')} {skipped.text or ''}"
        yield "::".join(part for part in (file, *classes.split("."), name) if part), reason


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="JUNIT.xml", help="written with junit_family=xunit1"
    )
    parser.add_argument("--list-missing", action="store_true", help="print tests that lack a package")
    parser.add_argument("--without", action="append", default=[], metavar="PACKAGE", help="may be missing")
    parser.add_argument("--expected", action="append", default=[], metavar="REASON", help="is expected, too")
    parser.add_argument("--needed", action="append", default=[], metavar="TEST", help="must have run")
    options = parser.parse_args()

    skipped: dict[str, str] = {}
    ran: set[str] = set()
    for report in options.reports:
        for test, reason in cases(report):
            if reason is None:
                ran |= {test, test.partition("::")[0]}
            else:
                skipped[test] = reason
    skipped = {test: reason for test, reason in skipped.items() if test not in ran}
    missing = [f"{package} is not installed" for package in options.without]
    expected = [*EXPECTED, *map(re.escape, [*missing, *options.expected])]
    unexpected = {
        test: reason
        for test, reason in skipped.items()
        if not any(re.search(pattern, reason) for pattern in expected)
    }
    if options.list_missing:
        print("\n".join(test for test, reason in unexpected.items() if re.search(MISSING, reason)))
        return 0
    names = {test.rpartition("::")[2].partition("[")[0] for test in ran}
    lost = sorted(set(options.needed) - names)
    print(f"{len(skipped)} tests were skipped, {len(unexpected)} of them unexpectedly")
    for test, reason in unexpected.items():
        print(f"{test}: {reason}")
    for name in lost:
        print(f"{name}: did not run")
    return 1 if unexpected or lost else 0


if __name__ == "__main__":
    sys.exit(main())
