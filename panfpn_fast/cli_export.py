"""`panfpn-fast export`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panfpn_fast.training.command import SettingsError

_DESCRIPTION = """\
Writes a network for images of one size, as programs that need the ops of this package and none of its networks:
  NAME.pt2        for torch.export.load
  NAME.aoti.pt2   for torch._inductor.aoti_load_package: compiled for this machine, which takes minutes

Both take uint8 RGB images [N, 3, H, W] that were resized already. docs/export.md tells what they return.
"""


def add_export(commands: Any) -> None:
    """Adds the command to the command line."""
    export = commands.add_parser(
        "export",
        help="write a network for torch.export and AOTInductor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "weights", metavar="WEIGHTS", help="checkpoint file, or the name of a published checkpoint"
    )
    export.add_argument("out", metavar="NAME", type=Path, help="of the files, with the folder")
    export.add_argument(
        "--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="of the images, in pixels"
    )
    export.add_argument(
        "--output-size", type=int, nargs=2, metavar=("H", "W"), help="of the results (default: --size)"
    )
    export.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: %(default)s)")
    export.add_argument(
        "--format", choices=("export", "aoti", "both"), default="both", help="default: %(default)s"
    )
    export.add_argument(
        "--device", help="where the program shall run (default: a CUDA GPU if there is one, else cpu)"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the network computes in (default: %(default)s)",
    )
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    import torch

    import panfpn_fast
    from panfpn_fast._device import check_device
    from panfpn_fast.inference.export import FORMATS, export

    try:
        device = check_device(args.device)
        model = panfpn_fast.load(args.weights).to(device, getattr(torch, args.dtype))
        paths = export(
            model,
            args.out,
            tuple(args.size),
            batch=args.batch,
            output_size=args.output_size and tuple(args.output_size),
            formats=FORMATS if args.format == "both" else (args.format,),
        )
    # The messages name the file, the argument or what is missing.
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise SettingsError(" ".join(str(error).split())) from error
    for path in paths:
        print(path)
    return 0
