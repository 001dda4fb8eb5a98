"""`panfpn-fast eval`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._annotations import add_annotations, check_annotations, open_annotations
from panfpn_fast.cli._common import (
    add_categories,
    add_device,
    add_semantic_weights,
    add_workers,
    categories_override,
    check_not_input,
    name_or_path,
    path,
    reporting_user_errors,
)
from panfpn_fast.cli._network import add_edges, describe

if TYPE_CHECKING:
    from panfpn_fast.data import Categories

_EVAL_DESCRIPTION = """\
Predicts annotated images and prints panoptic quality, IoU and AP; --json writes them to a file.
  COCO's format: panfpn-fast eval --weights model.pth --images val2017 --annotations panoptic_val2017.json
  Cityscapes:    panfpn-fast eval --weights model.pth --kind cityscapes --images cityscapes --annotations val
Several processes share the images: torchrun --nproc-per-node 8 -m panfpn_fast.cli eval ...
"""


def add_eval(commands: Any) -> None:
    """Adds the command to the command line."""
    evaluation = commands.add_parser(
        "eval",
        help="PQ, IoU and AP of a network on annotated images",
        description=_EVAL_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_argument(
        "--weights", required=True, type=name_or_path, metavar="NAME_OR_PATH", help="checkpoint"
    )
    add_annotations(evaluation)
    add_semantic_weights(evaluation)
    add_categories(evaluation)
    evaluation.add_argument("--json", type=path, metavar="FILE", help="write all figures to this file")
    evaluation.add_argument("--no-ap", action="store_true", help="do not compute AP, which needs pycocotools")
    evaluation.add_argument(
        "--skip-bad", action="store_true", help="skip and count unreadable images instead of stopping"
    )
    add_edges(evaluation)
    add_workers(evaluation, "1 on the CPU, 4 on a GPU")
    add_device(evaluation)
    evaluation.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    check_annotations(args)
    import panfpn_fast
    from panfpn_fast._files import atomic_write, prepare_file
    from panfpn_fast.data.class_check import ClassMismatchError
    from panfpn_fast.data.loader import check_workers
    from panfpn_fast.distributed import process_group
    from panfpn_fast.inference import Predictor
    from panfpn_fast.metrics.evaluation import evaluate
    from panfpn_fast.metrics.tables import format_table, without_nan
    from panfpn_fast.models import TwoNetworks

    if args.json is not None:
        inputs = ["annotations", "weights", "semantic_weights", "categories"]
        check_not_input("--json", args.json, args, inputs)
        prepare_file(args.json, "--json")
    if args.workers is not None:
        check_workers(args.workers)
    less_memory = "Try a smaller --short-edge or --workers 0"
    with reporting_user_errors(less_memory), ExitStack() as stack:
        try:
            process = stack.enter_context(process_group(args.device))
            classes = categories_override(args)
            model = panfpn_fast.load(args.weights, **classes)
            second = args.semantic_weights
            predictor = Predictor(
                model if second is None else TwoNetworks(model, panfpn_fast.load(second, **classes)),
                process.device,
                short_edge=args.short_edge,
                max_edge=args.max_edge,
                instances="panoptic" if args.no_ap else "all",
            )
        except (OSError, ValueError, ImportError) as error:  # the message names the file, URL or setting
            raise UserError(one_line(error)) from error
        try:
            dataset = open_annotations(args, predictor.categories)
        except ClassMismatchError as error:
            raise _other_classes(args, predictor.categories, str(error)) from None
        if dataset.categories != predictor.categories:
            raise _other_classes(
                args,
                predictor.categories,
                f"--kind {args.kind}: the network's classes are {predictor.categories.name}, not those of the images: "
                f"{dataset.categories.compared_with(predictor.categories)}",
            )
        if len(dataset) == 0:
            raise UserError(f"--annotations: expected annotated images, got none in {args.annotations}")
        if process.is_first:
            print(describe(args.weights, predictor))
        try:
            result = evaluate(
                predictor, dataset, with_ap=not args.no_ap, workers=args.workers, skip_bad=args.skip_bad
            )
        except ImportError as error:  # pycocotools, before the first image, or the native ops
            remedy = "" if args.no_ap else ", or use --no-ap"
            raise UserError(one_line(error) + remedy) from error
        if process.is_first:
            print(format_table(result))
            if args.json is not None:
                with atomic_write(args.json) as file:
                    file.write(json.dumps(without_nan(result), indent=1, allow_nan=False).encode())
    return 0


def _other_classes(args: argparse.Namespace, categories: Categories, problem: str) -> UserError:
    """Returns the error for annotations whose classes are not those of the network."""
    from panfpn_fast.data.categories import NUMBERED

    if categories.name != NUMBERED:
        return UserError(f"{problem}. Use --weights of a network that was trained on these classes")
    # Annotations of instances do not list the class of the background.
    listed = args.kind == "coco_panoptic" or (args.kind == "coco_instances" and not categories.stuff)
    file = args.annotations if listed else "the JSON that `panfpn-fast data convert` makes of them"
    return UserError(
        f"--categories: expected the classes of the network, because {args.weights} has no names; if they are those of "
        f"the annotations: --categories {file}"
    )
