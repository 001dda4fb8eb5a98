"""`panfpn-fast data`: check, convert and show annotated images. torch is imported only when a command runs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panfpn_fast._errors import UserError
from panfpn_fast.cli._annotations import add_annotations, add_own_classes, open_annotations
from panfpn_fast.cli._common import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    EXIT_USAGE,
    check_not_input,
    path,
    positive,
    report,
    reporting_user_errors,
)

if TYPE_CHECKING:
    from panfpn_fast.data import Categories, PanopticDataset, Sample
    from panfpn_fast.data.own_png import OwnPngs

_CHECK_DESCRIPTION = """\
Reads all images and annotations and prints the counts of each class and the files that cannot be read. The first
images are drawn to DIR/NAME.png. docs/data.md describes the formats.

exit status:
  0  all images were read
  1  some images cannot be read; each is named on stderr
  2  no image was read, for instance because a folder is missing
"""
_CONVERT_DESCRIPTION = """\
Writes the annotations in COCO's panoptic format: OUT.json, and PNGs in the folder OUT. The images stay where they are
(--kind synthetic writes them to OUT_images). The command prints the settings with which the result is read.

exit status:
  0  all images were converted
  1  some images cannot be read and were left out, because of --skip-bad; each is named on stderr
  2  OUT.json was not written
"""
_SHOW_DESCRIPTION = """\
Draws annotated images to DIR/NAME.png and prints their segments. A PATTERN selects the images whose file names contain
it; without one, the first images are drawn.
"""


def add_data(commands: Any) -> None:
    """Adds the command to the command line."""
    data = commands.add_parser("data", help="check, convert and draw annotated images")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    for name, help_, description, run in (
        ("check", "count classes, find broken files, draw images", _CHECK_DESCRIPTION, _check),
        ("convert", "write the annotations in COCO's panoptic format", _CONVERT_DESCRIPTION, _convert),
        ("show", "draw annotated images", _SHOW_DESCRIPTION, _show),
    ):
        action = actions.add_parser(
            name,
            help=help_,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_annotations(action)
        add_own_classes(action)
        if name == "convert":
            action.add_argument("--out", type=path, required=True, metavar="OUT.json", help="the JSON")
            action.add_argument(
                "--skip-bad", action="store_true", help="leave out unreadable images instead of stopping"
            )
        else:
            action.add_argument(
                "--out", type=path, default=Path(f"data_{name}"), metavar="DIR", help="default: %(default)s"
            )
            action.add_argument(
                "--pictures",
                type=positive,
                default=8,
                metavar="N",
                help="images to draw (default: %(default)s)",
            )
        if name == "show":
            action.add_argument(
                "--only", nargs="+", default=[], metavar="PATTERN", help="parts of file names"
            )
        action.set_defaults(run=run)


def _open(args: argparse.Namespace) -> PanopticDataset:
    """Opens the data set, and checks that the results can be written to `--out`."""
    from panfpn_fast._files import prepare_file, prepare_folder

    dataset = open_annotations(args)
    if len(dataset) == 0:
        raise UserError(f"--annotations: expected annotated images, got none in {args.annotations}")
    # --images of yolo may be a key of data.yaml, and --annotations of cityscapes is a split.
    inputs = {"yolo": ["annotations"], "cityscapes": ["images"]}.get(args.kind, ["images", "annotations"])
    check_not_input("--out", args.out, args, inputs)
    if args.run is _convert:
        folder = args.out.with_suffix("")
        check_not_input("--out without .json, the folder of the PNGs", folder, args, inputs)
        if args.kind == "labelme" and args.out.is_file() and _is_inside(args.out, Path(args.annotations)):
            raise UserError(f"--out: expected a new file, or one outside of --annotations, got {args.out}")
        prepare_file(args.out, "--out")
        prepare_folder(folder, "--out")
    else:
        prepare_folder(args.out, "--out")
    return dataset


def _is_inside(file: Path, folder: Path) -> bool:
    return folder.resolve() in file.resolve().parents


def _check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from panfpn_fast.data.own_png import OwnPngs
    from panfpn_fast.data.survey import survey

    pictures = OwnPngs("data show")
    with reporting_user_errors("Close other programs"):
        dataset = _open(args)
        chosen = set(range(min(args.pictures, len(dataset))))
        with tqdm(total=len(dataset), unit="image", leave=False) as bar:

            def note(index: int, sample: Sample) -> None:
                bar.update()
                if index in chosen:
                    _draw(sample, dataset.categories, args.out, pictures)

            found = survey(dataset, note)
    if found.images:
        print(found)
    for message in found.broken:
        report(message)
    if found.broken:
        report(f"{len(found.broken)} of {len(dataset)} images cannot be read")
    if not found.images:
        return EXIT_USAGE
    print(f"pictures: {args.out}")
    return EXIT_SOME_FAILED if found.broken else EXIT_OK


def _convert(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from panfpn_fast.data import DataError
    from panfpn_fast.data.coco_export import CocoExport

    if args.out.suffix != ".json":
        raise UserError(f"--out: expected a file with the suffix .json, got {args.out}")
    skipped = 0
    with reporting_user_errors("Close other programs"):
        dataset = _open(args)
        with CocoExport(args.out, dataset.categories, copy_images=args.kind == "synthetic") as export:
            for index in tqdm(range(len(dataset)), unit="image", leave=False):
                try:
                    export.add(dataset.load(index))
                except DataError as error:
                    if not args.skip_bad:
                        raise
                    report(str(error))
                    skipped += 1
            if not export.count:
                raise UserError(f"none of the {len(dataset)} images can be read; {args.out} is not written")
    # They hold for every preset.
    settings = [f"data.images={export.image_folder}", f"data.annotations={args.out}"]
    settings += ["data.kind=coco_panoptic", "data.categories="]
    print(f"{export.count} images; train with: {shlex.join(settings)}")
    return EXIT_SOME_FAILED if skipped else EXIT_OK


def _show(args: argparse.Namespace) -> int:
    from panfpn_fast.data import DataError
    from panfpn_fast.data.own_png import OwnPngs

    pictures = OwnPngs("data show")
    drawn = unreadable = 0
    with reporting_user_errors("Close other programs"):
        dataset = _open(args)
        for index in range(len(dataset)):
            if drawn == args.pictures:
                break
            try:
                sample = dataset.load(index)
            except DataError as error:
                if not args.only or any(part in str(error) for part in args.only):
                    raise
                unreadable += 1
                continue
            if args.only and not any(part in sample.file_name for part in args.only):
                continue
            picture = _draw(sample, dataset.categories, args.out, pictures)
            classes = sample.classes(dataset.categories)
            names = [
                f"{c.name}{' (crowd)' if crowd else ''} {int(area)}"
                for c, crowd, area in zip(classes, sample.crowd.tolist(), sample.area.tolist(), strict=True)
            ]
            print(f"{sample.file_name}: {', '.join(names) or 'nothing'} -> {picture}")
            drawn += 1
    if not drawn:
        hint = f". Images that cannot be read: {unreadable}; `data check` names them" if unreadable else ""
        raise UserError(f"--only: no file name contains {' or '.join(args.only)}{hint}")
    return EXIT_OK


def _draw(sample: Sample, categories: Categories, out: Path, pictures: OwnPngs) -> Path:
    from panfpn_fast.data.images import PHOTO_COMPRESS_LEVEL
    from panfpn_fast.inference.annotations import draw_sample

    picture = out / pictures.name(sample.image_id)
    pictures.save(draw_sample(sample, categories), picture, PHOTO_COMPRESS_LEVEL)
    return picture
