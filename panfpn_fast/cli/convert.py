"""`panfpn-fast convert`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from typing import Any

from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._common import EXIT_OK, name_or_path, path

_CONVERT_DESCRIPTION = """\
Converts a checkpoint of detectron2, mmdetection or panfpn_fast to one of these three layouts. The file keeps settings,
class names and colors. detectron2 and mmdetection ignore these and read their own configurations, so the command
prints every setting that differs from detectron2's published COCO models.
"""


def add_convert(commands: Any) -> None:
    """Adds the command to the command line."""
    convert = commands.add_parser(
        "convert", help="write a checkpoint in another layout", description=_CONVERT_DESCRIPTION
    )
    convert.add_argument(
        "source",
        metavar="IN",
        type=name_or_path,
        help="checkpoint file, or the name of a published checkpoint",
    )
    convert.add_argument(
        "target",
        metavar="OUT",
        type=path,
        help="native: .safetensors or .pth; detectron2: .pkl or .pth; mmdetection: .pth",
    )
    convert.add_argument(
        "--to",
        choices=("native", "detectron2", "mmdetection"),
        help="layout of OUT (default: detectron2 for .pkl, else native)",
    )
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from panfpn_fast.checkpoints import load, save
    from panfpn_fast.checkpoints.writer import prepare
    from panfpn_fast.models import PanopticFPNConfig

    try:
        prepare(args.target, args.to, "OUT")  # before a download
        model = load(args.source)
        save(model, args.target, args.to)
    except (OSError, ValueError, ImportError) as error:  # the messages name the file or what is missing
        raise UserError(one_line(error)) from error
    default = PanopticFPNConfig()
    for field, value in vars(model.config).items():
        if value != getattr(default, field):
            print(f"{field}: {value}")
    print(f"{args.source} -> {args.target}")
    return EXIT_OK
