"""`panfpn-fast info`."""

from __future__ import annotations

import argparse
from typing import Any

from panfpn_fast.cli._common import EXIT_OK


def add_info(commands: Any) -> None:
    """Adds the command to the command line."""
    info = commands.add_parser(
        "info",
        help="show versions, how the package was built, and what loaded",
        description="Shows versions, how the native libraries were built, and which of them loaded or why not.",
    )
    info.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    from panfpn_fast._load import build_report

    report = build_report()
    width = max(map(len, report), default=0) + 2
    for label, text in report.items():
        first, *more = str(text).splitlines() or [""]
        print(f"{label + ':':<{width}}{first}".rstrip())
        for line in more:
            print(" " * width + line)
    return EXIT_OK
