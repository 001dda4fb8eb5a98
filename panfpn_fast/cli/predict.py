"""`panfpn-fast predict`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panfpn_fast import DEFAULT_WEIGHTS
from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._common import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    EXIT_USAGE,
    add_categories,
    add_device,
    add_dtype,
    add_semantic_weights,
    categories_override,
    fraction,
    name_or_path,
    path,
    positive,
    report,
)
from panfpn_fast.cli._network import add_edges, describe

if TYPE_CHECKING:
    import torch

    from panfpn_fast.inference import Predictor

_PREDICT_DESCRIPTION = """\
Segments images and writes, in the folder given by --out:
  NAME_overlay.png      the image with its segments colored, outlined and named
  predictions/NAME.png  the panoptic map: segment id = R + 256 G + 65536 B, 0 = void
  predictions.json      the segments of all images, in COCO's panoptic result format

NAME is the image's name without its suffix; images of the same name get NAME_2, NAME_3 and so on.
Several processes share the images: torchrun --nproc-per-node 8 -m panfpn_fast.cli predict ...
"""

# Not in the option's help, where argparse would break the name at its hyphen.
_PREDICT_EPILOG = f"""\
default weights:
  {DEFAULT_WEIGHTS} (downloaded once)

exit status:
  0    all images were predicted
  1    some images failed; each is named on stderr, and the others were predicted
  2    nothing was predicted, for instance because the weights could not be loaded
  130  interrupted; finished results are kept
"""


def add_predict(commands: Any) -> None:
    """Adds the command to the command line."""
    predict = commands.add_parser(
        "predict",
        help="segment images: overlays, panoptic PNGs and a COCO result file",
        description=_PREDICT_DESCRIPTION,
        epilog=_PREDICT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument(
        "images",
        nargs="+",
        type=path,
        metavar="IMAGE_OR_FOLDER",
        help="image files, and folders of image files",
    )
    predict.add_argument(
        "--weights",
        type=name_or_path,
        default=DEFAULT_WEIGHTS,
        metavar="NAME_OR_PATH",
        help="checkpoint file, or the name of a published checkpoint (default: see below)",
    )
    add_semantic_weights(predict)
    add_categories(predict)
    predict.add_argument("--out", type=path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    add_device(predict)
    add_dtype(predict)
    add_edges(predict)
    predict.add_argument(
        "--score-threshold",
        type=fraction,
        metavar="0..1",
        help="drop things with a lower score (default: the model's setting, usually 0.5)",
    )
    predict.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images per pass (default: %(default)s)"
    )
    predict.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> int:
    from panfpn_fast._files import prepare_file, prepare_folder
    from panfpn_fast.data.images import find_images
    from panfpn_fast.distributed import launched_rank, process_group

    paths, missing = find_images(args.images)
    if not launched_rank():  # only one process complains
        for problem in missing:
            report(problem)
    if not paths:
        return EXIT_USAGE
    # Before the weights, which may take minutes to download.
    prepare_folder(args.out / "predictions", "--out")
    prepare_file(args.out / "predictions.json", "--out")
    from tqdm import tqdm

    from panfpn_fast.inference import predict_folder

    with ExitStack() as stack:
        process = stack.enter_context(process_group(args.device))
        predictor = _make_predictor(args, process.device)
        if process.is_first:
            print(describe(args.weights, predictor))
        try:
            failed = predict_folder(
                predictor,
                paths,
                args.out,
                batch_size=args.batch_size,
                on_result=tqdm.write,  # above the progress bar
                on_failure=report,
            )
        except BrokenPipeError:
            raise
        except OSError as error:  # errors of reading are handled image by image, so this is writing
            raise UserError(f"--out: cannot write: {one_line(error)}") from error
        except ImportError as error:  # the native ops did not load; the message has the remedy
            raise UserError(one_line(error)) from error
    if not process.is_first:  # a failure would make torchrun end the first process too
        return EXIT_OK
    if failed:
        report(f"{failed} of {len(paths)} images failed")
    return EXIT_SOME_FAILED if failed or missing else EXIT_OK


def _make_predictor(args: argparse.Namespace, device: torch.device) -> Predictor:
    import torch

    import panfpn_fast
    from panfpn_fast._device import is_out_of_memory
    from panfpn_fast.inference import Predictor
    from panfpn_fast.models import TwoNetworks

    wanted = args.score_threshold
    overrides: dict[str, Any] = {} if wanted is None else {"instance_score_threshold": wanted}
    try:
        classes = categories_override(args)
        overrides |= classes
        model = panfpn_fast.load(args.weights, **overrides)
        # Earlier, candidates below `score_threshold` (0.05, or 0.6 in mmdetection) are dropped; they would be missing.
        if wanted is not None and wanted < model.config.score_threshold:
            model = panfpn_fast.load(args.weights, **overrides, score_threshold=wanted)
        second = args.semantic_weights
        both = model if second is None else TwoNetworks(model, panfpn_fast.load(second, **classes))
    except (OSError, ValueError, ImportError) as error:  # the message names the file, URL or setting
        raise UserError(one_line(error)) from error
    try:
        return Predictor(
            both,
            device=device,
            dtype=getattr(torch, args.dtype),
            short_edge=args.short_edge,
            max_edge=args.max_edge,
            instances="panoptic",
        )
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise UserError(one_line(error)) from error
