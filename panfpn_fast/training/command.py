"""`panfpn-fast train`, `eval` and `demo`. torch is imported only when a command runs."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panfpn_fast.data.loader import PanopticDataset
    from panfpn_fast.distributed import Process
    from panfpn_fast.training.config import DataConfig, TrainConfig
    from panfpn_fast.training.trainer import Trainer

_TRAIN_DESCRIPTION = """\
Trains a network and writes, in the folder given by --out:
  checkpoint_*.pth   the run's state, for --resume
  model.pth          the result, for --weights of the other commands
  log.jsonl          losses, speed and evaluations, one JSON object a line
  tensorboard/       the same for TensorBoard, where it is installed
  config.json        the settings

Settings come from a preset, then from a YAML file, then from NAME=VALUE on the command line, such as
  solver.learning_rate=0.01 solver.batch_size=8 data.images=coco/train2017 model.backbone=resnet101
Several processes: torchrun --nproc-per-node 8 -m panfpn_fast.cli train ...
"""


_EVAL_DESCRIPTION = """\
Predicts annotated images and prints panoptic quality, IoU and AP; --json keeps them.
  COCO's format: panfpn-fast eval --weights model.pth --images val2017 --annotations panoptic_val2017.json
  Cityscapes:    panfpn-fast eval --weights model.pth --kind cityscapes --images cityscapes --annotations val
Several processes share the images: torchrun --nproc-per-node 8 -m panfpn_fast.cli eval ...
"""

# Short and longest edge of the images, as the training presets evaluate them.
_EVAL_EDGES = {"coco_panoptic": (800, 1333), "cityscapes": (1024, 2048), "synthetic": (128, 1000)}


class SettingsError(ValueError):
    """What the user can mend, told in one line: a setting, or a file that is missing or damaged."""


def add_training_commands(commands: Any) -> None:
    """Adds the three to the command line."""
    train = commands.add_parser(
        "train",
        help="train a network on COCO's panoptic format, Cityscapes or synthetic scenes",
        description=_TRAIN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "settings", nargs="*", metavar="NAME=VALUE", help="settings that differ from the preset's"
    )
    train.add_argument(
        "--preset", default="1x", help="1x, 3x, cityscapes, tiny or nuclei (default: %(default)s)"
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    train.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument("--device", help="such as cpu (default: a CUDA GPU if there is one, else cpu)")
    train.add_argument("--subset", type=int, metavar="N", help="train on N images only, chosen by the seed")
    train.add_argument("--skip-bad", action="store_true", help="replace and count images that cannot be read")
    train.set_defaults(run=_train)

    evaluation = commands.add_parser(
        "eval",
        help="PQ, IoU and AP of a network on annotated images",
        description=_EVAL_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_argument("--weights", required=True, metavar="NAME_OR_PATH", help="checkpoint")
    evaluation.add_argument(
        "--kind",
        choices=("coco_panoptic", "cityscapes", "synthetic"),
        default="coco_panoptic",
        help="of the data (default: %(default)s); synthetic takes no files",
    )
    evaluation.add_argument(
        "--images",
        metavar="DIR",
        help="folder of the images; cityscapes: the one that holds leftImg8bit and gtFine",
    )
    evaluation.add_argument(
        "--annotations",
        metavar="FILE",
        help="JSON of COCO's panoptic format; cityscapes: the split, such as val",
    )
    evaluation.add_argument(
        "--semantic-weights",
        metavar="NAME_OR_PATH",
        help="a second network, which labels the stuff; the first one finds the things",
    )
    evaluation.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    evaluation.add_argument("--no-ap", action="store_true", help="leave AP out, which needs pycocotools")
    evaluation.add_argument(
        "--skip-bad", action="store_true", help="leave out and count images that cannot be read"
    )
    evaluation.add_argument(
        "--short-edge",
        type=int,
        metavar="PIXELS",
        help="default: 800; cityscapes 1024, synthetic 128",
    )
    evaluation.add_argument(
        "--max-edge", type=int, metavar="PIXELS", help="default: 1333; cityscapes 2048, synthetic 1000"
    )
    evaluation.add_argument("--device", help="such as cpu (default: a CUDA GPU if there is one, else cpu)")
    evaluation.set_defaults(run=_eval)

    demo = commands.add_parser(
        "demo",
        help="train a small network on synthetic scenes, in minutes, and show what it learned",
        description="Makes synthetic scenes, trains a small network on the CPU, evaluates it on scenes that it has not "
        "seen, and writes metrics.json, gallery.png (input, truth, prediction) and model.pth.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--steps", type=int, metavar="N", help="of training (default: about five minutes' worth)"
    )
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.set_defaults(run=_demo)


def _share_cores() -> None:
    """Lets torch's threads sleep while they wait for one another: the processes that load images need the cores too.

    To be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _demo(args: argparse.Namespace) -> int:
    _share_cores()
    from panfpn_fast.training.demo import run_demo

    run_demo(args.out, args.steps, args.seed)
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.kind != "synthetic":
        for name in ("images", "annotations"):
            if getattr(args, name) is None:
                raise SettingsError(f"--{name}: is needed for the kind {args.kind}")
    import panfpn_fast
    from panfpn_fast.data.datasets import open_dataset
    from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
    from panfpn_fast.distributed import process_group
    from panfpn_fast.evaluation import evaluate, format_table, without_nan
    from panfpn_fast.inference import Predictor
    from panfpn_fast.inference.coco_format import atomic_write
    from panfpn_fast.models import TwoNetworks

    short_edge, max_edge = _EVAL_EDGES[args.kind]
    with ExitStack() as stack:
        try:
            process = stack.enter_context(process_group(args.device))
            model = panfpn_fast.load(args.weights)
            second = args.semantic_weights
            predictor = Predictor(
                model if second is None else TwoNetworks(model, panfpn_fast.load(second)),
                process.device,
                short_edge=short_edge if args.short_edge is None else args.short_edge,
                max_edge=max_edge if args.max_edge is None else args.max_edge,
            )
        except (OSError, ValueError, ImportError) as error:  # the messages name the file, address or setting
            raise SettingsError(" ".join(str(error).split())) from error
        if args.kind == "synthetic":
            dataset: PanopticDataset = SyntheticDataset(50, HELD_OUT_SEED)
        else:
            dataset = open_dataset(args.kind, args.images, args.annotations, predictor.categories.name)
        if dataset.categories != predictor.categories:
            raise SettingsError(f"--kind {args.kind}: the network's classes are {predictor.categories.name}")
        result = evaluate(predictor, dataset, with_ap=not args.no_ap, skip_bad=args.skip_bad)
        if process.is_first:
            print(format_table(result))
            if args.json is not None:
                with atomic_write(args.json) as file:
                    file.write(json.dumps(without_nan(result), indent=1, allow_nan=False).encode())
    return 0


def read_settings(preset: str, config: Path | None, settings: list[str]) -> TrainConfig:
    """Puts a preset, a YAML file and NAME=VALUE settings together.

    Raises:
        SettingsError: A setting does not exist or has a value that it cannot have.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise SettingsError(f'{error}. Training needs: pip install "panfpn_fast[train]"') from error
    from panfpn_fast.training.config import get_train_preset

    merged = OmegaConf.structured(get_train_preset(preset))
    try:
        if config is not None:
            merged = OmegaConf.merge(merged, OmegaConf.load(config))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(settings))
        result: TrainConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, OSError) as error:
        raise SettingsError(" ".join(str(error).split())) from error
    result.check()
    return result


def _train(args: argparse.Namespace) -> int:
    _share_cores()
    from panfpn_fast.data.files import DataError
    from panfpn_fast.distributed import process_group
    from panfpn_fast.training.trainer import Stopped

    with process_group(args.device) as process:
        trainer = _make_trainer(args, process)
        try:
            trainer.run()
        except Stopped as stopped:
            if process.is_first:
                print(stopped)
            return 130
        except (DataError, OSError, FloatingPointError) as error:
            # A process that loads images sends its whole traceback; the last line says what is wrong.
            raise SettingsError(str(error).strip().splitlines()[-1]) from error
        trainer.save_result(args.out / "model.pth")
    return 0


def _make_trainer(args: argparse.Namespace, process: Process) -> Trainer:
    """Puts a run together.

    Raises:
        SettingsError: Something is missing or cannot be.
    """
    from panfpn_fast.training.initialize import initialize
    from panfpn_fast.training.trainer import Trainer, make_model

    try:
        config = read_settings(args.preset, args.config, args.settings)
        config.subset = args.subset or config.subset
        config.skip_bad |= args.skip_bad
        dataset, held_out = make_datasets(config.data, config.seed)
        model = make_model(config, dataset)
        if config.init:
            for message in initialize(model, config.init):
                if process.is_first:
                    print(message)
        return Trainer(
            config,
            dataset,
            model,
            args.out,
            process,
            resume=args.resume,
            evaluate=_evaluation(config, held_out),
        )
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
    ) as error:  # the messages name the setting or the file
        raise SettingsError(" ".join(str(error).split())) from error


def _evaluation(config: TrainConfig, held_out: PanopticDataset | None) -> Any:
    if held_out is None:
        return None
    from panfpn_fast.evaluation import evaluate
    from panfpn_fast.inference import Predictor

    def run(model: Any) -> dict[str, float]:
        data = config.data
        predictor = Predictor(model, model.device, short_edge=data.val_short_edge, max_edge=data.val_max_edge)
        summary: dict[str, float] = evaluate(predictor, held_out, with_ap=False)["summary"]
        return summary

    return run


def make_datasets(data: DataConfig, seed: int) -> tuple[PanopticDataset, PanopticDataset | None]:
    """The data set to train on, and the one to evaluate on if there is one.

    Raises:
        SettingsError: A folder or file was not given.
    """
    if data.kind == "synthetic":
        from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset

        return (
            SyntheticDataset(data.synthetic_count, seed),
            SyntheticDataset(data.synthetic_val_count, HELD_OUT_SEED + seed),
        )
    for name in ("images", "annotations"):
        if not getattr(data, name):
            raise SettingsError(f"data.{name}: is not set; see DataConfig for what it takes")
    from panfpn_fast.data.datasets import open_dataset

    dataset = open_dataset(data.kind, data.images, data.annotations, data.categories or None)
    # The splits of Cityscapes share a folder.
    val_images = data.val_images or (
        data.images if data.kind == "cityscapes" and data.val_annotations else ""
    )
    if not val_images:
        return dataset, None
    # A JSON's own classes are named after it, so those of training serve for both.
    return dataset, open_dataset(data.kind, val_images, data.val_annotations, dataset.categories.name)
