"""`panfpn-fast demo`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from panfpn_fast.cli._common import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_workers,
    not_negative,
    path,
    positive,
    report,
    reporting_user_errors,
)


def add_demo(commands: Any) -> None:
    """Adds the command to the command line."""
    demo = commands.add_parser(
        "demo",
        help="train a small network on synthetic scenes, in minutes, and show what it learned",
        description="Makes synthetic scenes, trains a small network on the CPU, evaluates it on unseen scenes, and "
        "writes metrics.json, gallery.png (input, truth, prediction) and model.pth.",
    )
    demo.add_argument("--out", type=path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--steps", type=positive, metavar="N", help="training steps (default: about five minutes)"
    )
    demo.add_argument("--seed", type=not_negative, default=0, help="default: %(default)s")
    add_workers(demo, "1")
    demo.set_defaults(run=_demo)


def share_cores() -> None:
    """Makes torch's threads sleep while they wait, because the processes that load images need the cores too.

    Must be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _demo(args: argparse.Namespace) -> int:
    share_cores()
    from panfpn_fast.training.demo import run_demo
    from panfpn_fast.training.trainer import Stopped

    try:
        with reporting_user_errors("Close other programs, or try --workers 0"):
            run_demo(args.out, args.steps, args.seed, workers=args.workers)
    except Stopped:  # the demo cannot be resumed
        report("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_OK
