"""Options that name annotated images, and the data set that they stand for."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from panfpn_fast._errors import UserError
from panfpn_fast.cli._common import not_negative, path_or_key

if TYPE_CHECKING:
    from panfpn_fast.data import Categories, PanopticDataset

# panfpn_fast.data imports torch, which `--help` must not wait for; a test compares.
KINDS = ("coco_panoptic", "coco_instances", "yolo", "labelme", "masks", "cityscapes", "synthetic")


def add_annotations(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name annotated images."""
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="coco_panoptic",
        help="kind of the data set (default: %(default)s); synthetic needs no files",
    )
    parser.add_argument(
        "--images",
        type=path_or_key,
        metavar="DIR",
        help="folder of the images; for cityscapes, the folder with leftImg8bit and gtFine; for yolo also a key of "
        "data.yaml (default: val)",
    )
    parser.add_argument(
        "--annotations",
        type=path_or_key,
        metavar="PATH",
        help="JSON in COCO's format; data.yaml for yolo; folder for labelme and masks; for cityscapes, the split, such "
        "as val",
    )
    parser.add_argument(
        "--label-divisor",
        type=not_negative,
        default=0,
        metavar="D",
        help="meaning of the values in id masks: 0 for instances of one class (the default), 1 for classes, a larger D "
        "for class * D + instance",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the classes in id masks: of class 1, 2, ...; for labelme, all labels (default: alphabetical). "
        "Without them, the classes in id masks are the ids of a network's classes",
    )
    parser.add_argument(
        "--void-values",
        type=not_negative,
        nargs="+",
        default=[],
        metavar="V",
        help="values of id masks that are void",
    )
    parser.add_argument(
        "--background",
        choices=("stuff", "void"),
        default="stuff",
        help="what no annotation covers: the stuff class 'background', or void (default: %(default)s)",
    )


def add_own_classes(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the classes of a data set that is read without a network."""
    parser.add_argument("--stuff", nargs="+", default=[], metavar="NAME", help="classes that are stuff")


def open_annotations(args: argparse.Namespace, categories: Categories | None = None) -> PanopticDataset:
    """Opens the data set that the options name.

    Args:
        args: Values of the options of `add_annotations` and, without `categories`, of `add_own_classes`.
        categories: The classes of a network; None for the data set's own.

    Raises:
        UserError: If an option is missing, or the files are missing or damaged.
    """
    from panfpn_fast.data import ReadingRules, SyntheticDataset, open_dataset
    from panfpn_fast.data.synthetic import HELD_OUT_SEED

    check_annotations(args)
    if args.kind == "synthetic":
        return SyntheticDataset(50, HELD_OUT_SEED)
    rules = ReadingRules(
        background=args.background,
        classes=tuple(args.classes),
        label_divisor=args.label_divisor,
        void_values=tuple(args.void_values),
    )
    if categories is None:
        rules = dataclasses.replace(rules, stuff=tuple(args.stuff))
    images = "val" if args.images is None else args.images
    try:
        return open_dataset(args.kind, images, args.annotations, categories, rules)
    except ImportError as error:  # the message has the remedy
        raise UserError(str(error)) from error


def check_annotations(args: argparse.Namespace) -> None:
    """Checks that the options that a kind needs are there.

    Raises:
        UserError: If an option is missing.
    """
    needed = {"synthetic": (), "yolo": ("annotations",)}.get(args.kind, ("images", "annotations"))
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--{name}: expected a path, because --kind is {args.kind}; got nothing")
