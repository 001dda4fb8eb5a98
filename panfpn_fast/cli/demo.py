"""`panfpn-fast demo`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from panfpn_fast._errors import UserError
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

_DESCRIPTION = """\
Predicts the sample images of the package with the network of the package, builtin://nuclei, which takes seconds and
downloads nothing. Writes NAME_overlay.png for each image, gallery.png (input, truth, prediction) and metrics.json.
Then times one network against two, and some ops against PyTorch, on this machine's CPU.

With --train, makes synthetic scenes and trains that network on the CPU to find their shapes, in three to five minutes.
Then evaluates it on unseen scenes, and writes metrics.json, gallery.png and model.pth.
"""


def add_demo(commands: Any) -> None:
    """Adds the command to the command line."""
    demo = commands.add_parser(
        "demo",
        help="predict sample images and time this machine; with --train, train a network",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--out", type=path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--train", action="store_true", help="train the network on synthetic scenes instead")
    demo.add_argument("--steps", type=positive, metavar="N", help="training steps (default: 900)")
    demo.add_argument(
        "--seed", type=not_negative, metavar="N", help="seed of the scenes and of new layers (default: 0)"
    )
    add_workers(demo, "1")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    if args.train:
        return _train(args)
    for name in ("steps", "seed", "workers"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: expected --train with it, since only training uses it")
    from panfpn_fast.demo.comparisons import compare_networks, compare_ops, format_comparison
    from panfpn_fast.demo.samples import predict_samples

    with reporting_user_errors("Close other programs"):
        predict_samples(args.out)
        print("\nOn this CPU (median time of ours, the other way, ours is):", flush=True)
        print(format_comparison(compare_networks()), flush=True)
        for one in compare_ops():
            print(format_comparison(one), flush=True)
    return EXIT_OK


def share_cores() -> None:
    """Makes torch's threads sleep while they wait, because the processes that load images need the cores too.

    Must be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _train(args: argparse.Namespace) -> int:
    share_cores()
    from panfpn_fast.demo.scenes import train_on_scenes
    from panfpn_fast.training.trainer import Stopped

    try:
        with reporting_user_errors("Close other programs, or try --workers 0"):
            train_on_scenes(args.out, args.steps, args.seed or 0, workers=args.workers)
    except Stopped:  # the demo cannot be resumed
        report("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_OK
