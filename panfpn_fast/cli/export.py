"""`panfpn-fast export`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from typing import Any

from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._common import add_dtype, name_or_path, path, pixels, positive
from panfpn_fast.cli._network import usual_size

_DESCRIPTION = """\
Writes a network for images of one size, as programs that need only the ops of this package:
  NAME.pt2        for torch.export.load
  NAME.aoti.pt2   for torch._inductor.aoti_load_package: compiled for this machine, which takes minutes

or, with --format onnx, for one size or any, as a file that needs nothing of this package:
  NAME.onnx       for ONNX Runtime, OpenVINO and other engines

All take resized uint8 RGB images [N, 3, H, W]. docs/export.md describes their outputs.
"""


def add_export(commands: Any) -> None:
    """Adds the command to the command line."""
    export = commands.add_parser(
        "export",
        help="write a network for torch.export, AOTInductor and ONNX",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "weights",
        metavar="WEIGHTS",
        type=name_or_path,
        help="checkpoint file, or the name of a published checkpoint",
    )
    export.add_argument("out", metavar="NAME", type=path, help="path of the files without suffix")
    sizes = export.add_mutually_exclusive_group()
    sizes.add_argument(
        "--size",
        type=pixels,
        nargs=2,
        metavar=("H", "W"),
        help="size of the images, in pixels (default: a 2:3 image resized with the network's edges)",
    )
    sizes.add_argument("--any-size", action="store_true", help="take images of any size; for --format onnx")
    export.add_argument(
        "--output-size",
        type=pixels,
        nargs=2,
        metavar=("H", "W"),
        help="size of the results (default: that of the images)",
    )
    export.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="images per call (default: %(default)s)"
    )
    export.add_argument(
        "--format",
        choices=("export", "aoti", "both", "onnx"),
        default="both",
        help="both stands for export and aoti (default: %(default)s)",
    )
    export.add_argument(
        "--max-candidates",
        type=positive,
        default=4096,
        metavar="N",
        help="most pairs of a proposal and a class per image that enter NMS (default: %(default)s)",
    )
    export.add_argument(
        "--device",
        help="device that the program runs on, not for onnx (default: a CUDA GPU if there is one, else cpu)",
    )
    add_dtype(export)
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    import torch

    import panfpn_fast
    from panfpn_fast._device import resolve_device
    from panfpn_fast.inference.export import PROGRAMS, export, prepare

    formats = PROGRAMS if args.format == "both" else (args.format,)
    if args.any_size and args.format != "onnx":
        raise UserError(
            f"--any-size: only --format onnx takes images of any size, got --format {args.format}"
        )
    try:
        device = resolve_device(args.device)
        prepare(args.out, formats)  # before a download
        model = panfpn_fast.load(args.weights).to(device, getattr(torch, args.dtype))
        size = None if args.any_size else tuple(args.size or usual_size(model.config))
        pixels_of_images = "any size" if size is None else f"{size[0]} x {size[1]} pixels"
        print(f"{args.weights}: images of {pixels_of_images}; {model.config.categories!r}")
        paths = export(
            model,
            args.out,
            size,
            batch=args.batch,
            output_size=args.output_size and tuple(args.output_size),
            formats=formats,
            max_candidates=args.max_candidates,
        )
    # The messages name the file, the argument or what is missing.
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(one_line(error)) from error
    for written in paths:
        print(written)
    return 0
