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
Segments images and videos and writes, in the folder given by --out, for images:
  NAME_overlay.png      the image with its segments colored, outlined and named
  predictions/NAME.png  the panoptic map: segment id = R + 256 G + 65536 B, 0 = void
  predictions.json      the segments of all images, in COCO's panoptic result format
for videos:
  NAME_overlay.mp4      the video with its segments colored, outlined and named
  NAME_segments.jsonl   a line of JSON about the video, and one for each frame with its segments

A SOURCE is an image or a video, a folder of images, a pattern such as 'photos/**/*.jpg', an address that begins
with http:// or https://, a camera such as camera:0, or - for paths in the standard input, one a line.
The frames of a GIF, TIFF, APNG, WebP or AVIF with several are images called NAME_0001, NAME_0002 and so on.

NAME is the file's name without its suffix; files of the same name get NAME_2, NAME_3 and so on. A second run adds
its results to those in the folder, and replaces those of the same images.
Several processes share the files: torchrun --nproc-per-node 8 -m panfpn_fast.cli predict ...
"""

# Not in the option's help, where argparse would break the name at its hyphen.
_PREDICT_EPILOG = f"""\
default weights:
  {DEFAULT_WEIGHTS} (downloaded once)

exit status:
  0    all images and videos were predicted
  1    some failed; each is named on stderr, and the others were predicted
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
        "sources",
        nargs="+",
        type=_source,
        metavar="SOURCE",
        help="images, videos, folders of images, and the other sources above",
    )
    predict.add_argument(
        "--recursive", action="store_true", help="search the folders in folders, too (links are not followed)"
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
    predict.add_argument(
        "--overlay",
        choices=("png", "jpg", "none"),
        default="png",
        help="format of the overlays of images; none also leaves out those of videos (default: %(default)s)",
    )
    predict.add_argument(
        "--frame-maps",
        action="store_true",
        help="write the panoptic maps of the frames of videos, as for images called NAME_000001 and so on",
    )
    predict.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help="predict each N-th frame of videos and cameras (default: %(default)s)",
    )
    predict.add_argument(
        "--max-frames", type=positive, metavar="N", help="stop each video or camera after N predicted frames"
    )
    predict.add_argument("--quiet", action="store_true", help="print errors only, and show no progress bar")
    predict.set_defaults(run=_predict)


def _source(text: str) -> str:
    """Parses a source; an argparse type."""
    if not text:
        raise argparse.ArgumentTypeError("expected an image, a video or a folder, got nothing")
    if "://" in text and not text.lower().startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"expected a path on this machine, or an address that begins with http:// or https://, got {text!r}"
        )
    return text


def _predict(args: argparse.Namespace) -> int:
    from panfpn_fast._files import prepare_file, prepare_folder
    from panfpn_fast.distributed import broadcast, process_group
    from panfpn_fast.inference.finding import is_video

    with ExitStack() as stack:
        process = stack.enter_context(process_group(args.device))
        # The first process finds the sources for all: it alone reads the standard input.
        found: Any = broadcast(_find(args) if process.is_first else None)
        if not found.places:
            return EXIT_USAGE
        # Before the weights, which may take minutes to download.
        if args.frame_maps or not all(map(is_video, found.places)):
            prepare_folder(args.out / "predictions", "--out")
            prepare_file(args.out / "predictions.json", "--out")
        prepare_folder(args.out, "--out")
        from tqdm import tqdm

        from panfpn_fast.inference import predict_folder

        predictor = _make_predictor(args, process.device)
        if process.is_first and not args.quiet:
            print(describe(args.weights, predictor))
        try:
            failed = predict_folder(
                predictor,
                found.places,
                args.out,
                batch_size=args.batch_size,
                overlay=args.overlay,
                frame_maps=args.frame_maps,
                every=args.every,
                max_frames=args.max_frames,
                on_result=None if args.quiet else tqdm.write,  # above the progress bar
                on_failure=report,
                progress=not args.quiet,
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
        report(f"{failed} of {len(found.places)} files failed")
    return EXIT_SOME_FAILED if failed or found.problems else EXIT_OK


def _find(args: argparse.Namespace) -> Any:
    """Finds the images and videos, and reports what is wrong or left out."""
    from panfpn_fast.inference.finding import find_sources

    try:
        found = find_sources(args.sources, args.recursive, args.out)
    except ImportError as error:  # a video needs a package; the message has the remedy
        raise UserError(one_line(error)) from error
    for message in [*found.problems, *([] if args.quiet else found.skipped)]:
        report(message)
    return found


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
