"""`panfpn-fast train`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._common import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_device,
    not_negative,
    path,
    reporting_user_errors,
)
from panfpn_fast.cli.demo import share_cores

_TRAIN_DESCRIPTION = """\
Trains a network and writes, in the folder given by --out:
  checkpoint_*.pth   the run's state, for --resume
  model.pth          the result, for --weights of the other commands
  best.pth           the weights with the best evaluation, for --weights, too
  log.jsonl          losses, speed and evaluations, one JSON object a line
  evaluations.jsonl  the figures of each class
  tensorboard/       the same for TensorBoard, where it is installed
  config.json        the settings
  gallery.png        images, annotations and predictions of the last evaluation
  curves.png         losses, learning rate and figures, where matplotlib is installed

Settings come from a preset, then from a YAML file, then from NAME=VALUE on the command line, for example
  solver.learning_rate=0.01 solver.batch_size=8 data.images=coco/train2017 model.backbone=resnet101
data.kind is the kind of your data; `panfpn-fast data check` reads them in the same way:
  coco_panoptic, coco_instances, yolo, labelme, masks, cityscapes, synthetic
The presets 1x and 3x take only COCO's classes; data.categories='' takes those of the annotations.
The preset finetune starts from COCO's weights, or from those of init=PATH, and takes the classes of your annotations.
--resume continues with the settings of the run; only those that change need to be given.
Settings and most kinds need the extra [train]: pip install ".[train]" in the checkout of panfpn_fast.
Several processes: torchrun --nproc-per-node 8 -m panfpn_fast.cli train ...
"""


def add_train(commands: Any) -> None:
    """Adds the command to the command line."""
    train = commands.add_parser(
        "train",
        help="train a network on annotated images in COCO's formats and others, or on synthetic scenes",
        description=_TRAIN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings that override the preset")
    train.add_argument(
        "--preset",
        help="1x, 3x, finetune, cityscapes, tiny or nuclei (default: 1x; with --resume, the settings of the run)",
    )
    train.add_argument("--config", type=path, metavar="FILE", help="YAML file with settings")
    train.add_argument("--out", type=path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add_device(train)
    train.add_argument(
        "--subset", type=not_negative, metavar="N", help="train on N images, chosen by the seed; 0 for all"
    )
    train.add_argument(
        "--skip-bad",
        action="store_true",
        help="replace and count unreadable images instead of stopping; the evaluation leaves them out",
    )
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    share_cores()
    from panfpn_fast.distributed import process_group
    from panfpn_fast.training.curves import draw_curves
    from panfpn_fast.training.settings import read_settings, settings_of_run
    from panfpn_fast.training.setup import make_trainer
    from panfpn_fast.training.trainer import RESULT, SETTINGS, Stopped

    less_memory = "Try a lower solver.batch_size, smaller images or workers=0"
    # Without patience: the processes take the same steps at the same time.
    with reporting_user_errors(less_memory), process_group(args.device, patience=None) as process:
        try:
            of_run = args.out / SETTINGS
            if args.resume and not (args.preset or args.config or args.settings or of_run.exists()):
                raise UserError(
                    f"--resume: expected a run in the folder of --out, got no {of_run}; give the run's folder, or "
                    "--preset and settings"
                )
            continues = args.resume and args.preset is None and of_run.exists()
            base = settings_of_run(of_run) if continues else args.preset or "1x"
            config = read_settings(base, args.config, args.settings)
            config.subset = config.subset if args.subset is None else args.subset
            config.skip_bad |= args.skip_bad
            trainer = make_trainer(
                config, args.out, process, resume=args.resume, say=print if process.is_first else None
            )
        # The messages name the setting or the file.
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise UserError(one_line(error)) from error
        try:
            trainer.run()
        except Stopped as stopped:
            if process.is_first:
                print(stopped)
            return EXIT_INTERRUPTED
        trainer.save_result(args.out / RESULT)
        if process.is_first:
            print(draw_curves(args.out))
    return EXIT_OK
