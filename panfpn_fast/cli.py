"""The command line: `panfpn-fast predict`, `train`, `eval`, `demo`, `convert`, `export`, `bench` and `info`.

torch is imported only by the subcommand that needs it, so that `--help` and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from panfpn_fast.cli_bench import add_bench
from panfpn_fast.cli_export import add_export
from panfpn_fast.training.command import SettingsError, add_training_commands

if TYPE_CHECKING:
    import torch

    from panfpn_fast.distributed import Process
    from panfpn_fast.inference import CocoPanopticWriter, PanopticResult, Predictor
    from panfpn_fast.inference.preprocess import ImageArray

DEFAULT_WEIGHTS = "detectron2://COCO-PanopticSegmentation/panoptic_fpn_R_50_3x"

_EXIT_OK, _EXIT_SOME_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 0, 1, 2, 130

_PREDICT_DESCRIPTION = """\
Segments images and writes, in the folder given by --out:
  NAME_overlay.png      the image with its segments coloured, outlined and named
  predictions/NAME.png  the panoptic map: segment id = R + 256 G + 65536 B, 0 = void
  predictions.json      what the ids mean, for all images, in COCO's panoptic result format

NAME is the image's name without its suffix; images of the same name get NAME_2, NAME_3 and so on.
Several processes share the images: torchrun --nproc-per-node 8 -m panfpn_fast.cli predict ...
"""

# Not in the option's help, where argparse would break the name at its hyphen.
_PREDICT_EPILOG = f"""\
default weights:
  {DEFAULT_WEIGHTS} (downloaded once)

exit status:
  0    all images were predicted
  1    some could not be read; each is named on stderr, and the others are done
  2    nothing could be done, for instance because the weights cannot be loaded
  130  interrupted; what was computed is kept
"""

_CONVERT_DESCRIPTION = """\
Reads a checkpoint of detectron2's, mmdetection's or our own and writes it in one of these layouts. Settings, class
names and colours go along, but the other two take theirs from their own configurations: what of this network is
otherwise than in the published COCO models of detectron2 is printed.
"""


class _UserError(Exception):
    """Something the user can mend: shown in one line, without a traceback."""


class _Job(NamedTuple):
    """One image, the name (unique in this run) of its results, and what the result file calls it."""

    path: Path
    name: str
    source: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status; argparse itself exits on `--help` and usage errors."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be valid text; naming one must not end the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = args.run
        return command(args)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_SOME_FAILED
    except (_UserError, SettingsError) as error:
        _report(str(error))
        return _EXIT_USAGE
    except ValueError as error:
        from panfpn_fast.data.files import DataError

        if not isinstance(error, DataError):
            raise
        _report(_one_line(error))
        return _EXIT_USAGE
    except KeyboardInterrupt:
        _report("interrupted")
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="panfpn-fast",
        description="Panoptic segmentation with Panoptic FPN: things and stuff in one picture.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands)
    add_training_commands(commands)
    _add_convert(commands)
    add_export(commands)
    add_bench(commands)
    info = commands.add_parser(
        "info",
        help="show versions, how the package was built, and what loaded",
        description="Shows versions, how the native libraries were built, and what loaded or why not.",
    )
    info.set_defaults(run=_info)
    return parser


def _add_predict(commands: Any) -> None:
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
        type=Path,
        metavar="IMAGE_OR_FOLDER",
        help="image files, and folders of image files",
    )
    predict.add_argument(
        "--weights",
        default=DEFAULT_WEIGHTS,
        metavar="NAME_OR_PATH",
        help="checkpoint file, or the name of a published checkpoint (default: see below)",
    )
    predict.add_argument(
        "--semantic-weights",
        metavar="NAME_OR_PATH",
        help="checkpoint of a second network, which labels the stuff; the first one finds the things",
    )
    predict.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    predict.add_argument(
        "--device", help="such as cpu or cuda:0 (default: a CUDA GPU if there is one, else cpu)"
    )
    predict.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the network computes in (default: %(default)s)",
    )
    predict.add_argument(
        "--short-edge",
        type=_positive,
        default=800,
        metavar="PIXELS",
        help="resize to this (default: %(default)s)",
    )
    predict.add_argument(
        "--max-edge",
        type=_positive,
        default=1333,
        metavar="PIXELS",
        help="limit for the longer edge (default: %(default)s)",
    )
    predict.add_argument(
        "--score-threshold",
        type=_fraction,
        metavar="0..1",
        help="things scored below this are left out (default: the model's own, usually 0.5)",
    )
    predict.add_argument(
        "--batch-size", type=_positive, default=1, metavar="N", help="images per pass (default: %(default)s)"
    )
    predict.set_defaults(run=_predict)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert", help="write a checkpoint in another layout", description=_CONVERT_DESCRIPTION
    )
    convert.add_argument(
        "source", metavar="IN", help="checkpoint file, or the name of a published checkpoint"
    )
    convert.add_argument(
        "target",
        metavar="OUT",
        type=Path,
        help="own: .safetensors or .pth; detectron2: .pkl or .pth; mmdetection: .pth",
    )
    convert.add_argument(
        "--to",
        choices=("own", "detectron2", "mmdetection"),
        help="layout of OUT (default: detectron2 for .pkl, else own)",
    )
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from panfpn_fast.checkpoints import load, save
    from panfpn_fast.models import PanopticFPNConfig

    try:
        model = load(args.source)
        save(model, args.target, args.to)
    except (OSError, ValueError, ImportError) as error:  # the messages name the file or what is missing
        raise _UserError(_one_line(error)) from error
    default = PanopticFPNConfig()
    for field, value in vars(model.config).items():
        if value != getattr(default, field):
            print(f"{field}: {value}")
    print(f"{args.source} -> {args.target}")
    return _EXIT_OK


def _predict(args: argparse.Namespace) -> int:
    paths, missing = _collect(args.images)
    if os.environ.get("RANK", "0") == "0":  # torchrun's; one process complains for all
        for problem in missing:
            _report(problem)
    if not paths:
        return _EXIT_USAGE
    try:  # before the weights, which may take minutes to download
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UserError(f"cannot make the folder {args.out}: {error.strerror or error}") from error
    from panfpn_fast.distributed import process_group

    with ExitStack() as stack:
        try:
            process = stack.enter_context(process_group(args.device))
        except ValueError as error:
            raise _UserError(_one_line(error)) from error
        failed = _predict_share(args, _make_predictor(args, process.device), process, paths)
    if not process.is_first:  # torchrun would end the first one, too
        return _EXIT_OK
    if failed:
        _report(f"{failed} of {len(paths)} images failed")
    return _EXIT_SOME_FAILED if failed or missing else _EXIT_OK


def _predict_share(
    args: argparse.Namespace, predictor: Predictor, process: Process, paths: Sequence[Path]
) -> int:
    """Predicts every W-th image, W the number of processes, and returns how many could not be, of all in the first."""
    from panfpn_fast.distributed import gather_to_first
    from panfpn_fast.inference import CocoPanopticWriter

    jobs = _name_jobs(paths, args.out)
    mine = jobs[process.rank :: process.world_size]
    with_bar = process.is_first and len(jobs) > 1
    try:
        with CocoPanopticWriter(args.out, predictor.categories, rank=process.rank) as writer:
            failed = _predict_all(predictor, writer, mine, args.out, args.batch_size, with_bar)
            writer.gather([job.name for job in jobs])
    except BrokenPipeError:
        raise
    except OSError as error:  # reading is dealt with image by image, so this is writing
        raise _UserError(f"cannot write to {args.out}: {error}") from error
    except ImportError as error:  # the native ops did not load; the message has the remedy
        raise _UserError(_one_line(error)) from error
    return sum(gather_to_first(failed))


def _make_predictor(args: argparse.Namespace, device: torch.device) -> Predictor:
    import torch

    import panfpn_fast
    from panfpn_fast.inference import Predictor
    from panfpn_fast.models import TwoNetworks

    wanted = args.score_threshold
    overrides = {} if wanted is None else {"instance_score_threshold": wanted}
    try:
        model = panfpn_fast.load(args.weights, **overrides)
        # Candidates are cut at `score_threshold` (0.05, mmdetection's 0.6) before, and would be missing here.
        if wanted is not None and wanted < model.config.score_threshold:
            model = panfpn_fast.load(args.weights, **overrides, score_threshold=wanted)
        second = args.semantic_weights
        both = model if second is None else TwoNetworks(model, panfpn_fast.load(second))
    except (OSError, ValueError, ImportError) as error:  # the messages name the file, address or setting
        raise _UserError(_one_line(error)) from error
    try:
        return Predictor(
            both,
            device=device,
            dtype=getattr(torch, args.dtype),
            short_edge=args.short_edge,
            max_edge=args.max_edge,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        raise _UserError(_one_line(error)) from error


def _predict_all(
    predictor: Predictor,
    writer: CocoPanopticWriter,
    jobs: list[_Job],
    out: Path,
    batch_size: int,
    with_bar: bool,
) -> int:
    """Predicts and writes every image, and returns how many could not be."""
    from tqdm import tqdm

    failed = 0
    with tqdm(total=len(jobs), unit="image", disable=not with_bar) as bar:
        for batch in _batches(jobs, batch_size):
            started = time.perf_counter()
            readable: list[tuple[_Job, ImageArray]] = []
            for job in batch:
                image = _read(job.path)
                if image is not None:
                    readable.append((job, image))
            predicted = _predict_batch(predictor, readable)
            shared = (time.perf_counter() - started) / max(1, len(predicted))
            for job, image, result in predicted:
                started = time.perf_counter()
                overlay = _write(writer, job, image, result, out)
                seconds = shared + time.perf_counter() - started
                # Through tqdm, so that the line does not tear the bar.
                tqdm.write(f"{job.path.name}: {result.summary()} -> {overlay} ({seconds:.2f} s)")
            failed += len(batch) - len(predicted)
            bar.update(len(batch))
    return failed


def _read(path: Path) -> ImageArray | None:
    from panfpn_fast.inference.preprocess import read_image

    try:
        return read_image(path)
    except OSError as error:  # the message names the file
        _report(str(error))
        return None


def _predict_batch(
    predictor: Predictor, images: list[tuple[_Job, ImageArray]]
) -> list[tuple[_Job, ImageArray, PanopticResult]]:
    """Predicts images together, or one by one where memory is too short for all."""
    try:
        results = predictor([image for _, image in images])
        return [(job, image, result) for (job, image), result in zip(images, results, strict=True)]
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if len(images) == 1:
            _report(
                f"{images[0][0].path}: not enough memory on {predictor.device}; try a smaller --short-edge"
            )
            return []
    return [done for one in images for done in _predict_batch(predictor, [one])]


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU, in torch's CPU allocator (which has no type of its own), or in Python."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _write(
    writer: CocoPanopticWriter, job: _Job, image: ImageArray, result: PanopticResult, out: Path
) -> Path:
    from panfpn_fast.inference.coco_format import save_png

    overlay = out / f"{job.name}_overlay.png"
    writer.add(result, job.name, source=job.source)
    # Photographs hardly compress: level 2 takes a quarter of the default's time for a seventh more bytes.
    save_png(result.draw(image), overlay, compress_level=2)
    return overlay


def _collect(arguments: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Lists the images that the arguments mean, each file once, and says what is wrong with the others."""
    from panfpn_fast.inference.preprocess import is_image_path

    paths: dict[Path, Path] = {}
    problems = []
    for argument in arguments:
        found = [argument]
        try:
            if argument.is_dir():
                found = sorted(path for path in argument.iterdir() if is_image_path(path) and path.is_file())
                if not found:
                    problems.append(f"{argument}: no images in this folder (its subfolders are not searched)")
            else:
                argument.stat()
        except OSError as error:
            found = []
            problems.append(f"{argument}: {error.strerror or error}")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values()), problems


def _name_jobs(paths: Sequence[Path], out: Path) -> list[_Job]:
    """Gives each image a name of its own, such that no result overwrites another or one of the images."""
    inputs = {path.resolve() for path in paths}
    taken: set[str] = set()
    jobs = []
    for path in paths:
        for count in itertools.count(1):
            name = _fitting(path.stem, "" if count == 1 else f"_{count}")
            outputs = {
                (out / f"{name}_overlay.png").resolve(),
                (out / "predictions" / f"{name}.png").resolve(),
            }
            # Some file systems do not tell upper from lower case.
            if name.casefold() not in taken and not outputs & inputs:
                break
        taken.add(name.casefold())
        jobs.append(_Job(path, name, source=path.name if count == 1 else path.as_posix()))
    return jobs


def _fitting(stem: str, suffix: str) -> str:
    """Joins the two, with as much of the stem as lets the longest file name made from it have 255 bytes."""
    while len(os.fsencode(f"{stem}{suffix}_overlay.png")) > 255:
        stem = stem[:-1]
    return stem + suffix


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[Sequence[_Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _info(_: argparse.Namespace) -> int:
    from panfpn_fast._load import build_report

    report = build_report()
    width = max(map(len, report), default=0) + 2
    for label, text in report.items():
        first, *more = str(text).splitlines() or [""]
        print(f"{label + ':':<{width}}{first}".rstrip())
        for line in more:
            print(" " * width + line)
    return _EXIT_OK


def _report(message: str) -> None:
    """Says what went wrong on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"panfpn-fast: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _version() -> str:
    try:
        return metadata.version("panfpn_fast")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _positive(text: str) -> int:
    number = int(text)  # argparse reports a ValueError as "invalid ... value"
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return number


def _fraction(text: str) -> float:
    number = float(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
