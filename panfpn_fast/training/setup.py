"""From settings to a trainer: opens data sets, builds the network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from panfpn_fast._errors import UserError
from panfpn_fast.checkpoints import read_config
from panfpn_fast.data.categories import Categories
from panfpn_fast.data.class_check import ClassMismatchError
from panfpn_fast.data.datasets import open_dataset
from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
from panfpn_fast.data.yolo import DataYaml
from panfpn_fast.distributed import Process
from panfpn_fast.training.config import OF_INIT, DataConfig, TrainConfig
from panfpn_fast.training.initialize import initialize
from panfpn_fast.training.run_state import Checkpoints
from panfpn_fast.training.trainer import Trainer, make_model
from panfpn_fast.training.validation import Validation


def make_trainer(
    config: TrainConfig,
    out: Path,
    process: Process,
    *,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> Trainer:
    """Opens the data sets, builds and initializes the network, and puts a trainer around them.

    Args:
        config: The run's settings.
        out: Folder of the run.
        process: This process's rank and device.
        resume: Continue from the newest checkpoint in `out`. The file with the initial weights is then not read.
        say: Receives one message for each part that the initial weights do not cover; None drops them.

    Raises:
        ValueError: If a setting is invalid, a file is missing or damaged, or `out` cannot be written to; the message
            names it.
        OSError: If a file cannot be read.
        ImportError: If the backbone's library is not installed.
    """
    dataset, held_out = make_datasets(config.data, config.seed)
    newest = Checkpoints(out).newest if resume else None
    of_run = read_config(newest) if newest is not None and config.preset == OF_INIT else None
    model = make_model(config, dataset, of_run)
    if config.init and newest is None:
        for message in initialize(model, config.init):
            if say is not None:
                say(message)
    evaluate = None if held_out is None else Validation(config, held_out, model)
    return Trainer(config, dataset, model, out, process, resume=resume, evaluate=evaluate)


def make_datasets(data: DataConfig, seed: int) -> tuple[PanopticDataset, PanopticDataset | None]:
    """Returns the data set to train on, and the data set to evaluate on or None.

    Raises:
        UserError: If a folder or file is not set or missing, or there are no images.
    """
    dataset, held_out = _open_datasets(data, seed)
    synthetic = data.kind == "synthetic"
    for images, name in (
        (dataset, "synthetic_count" if synthetic else "annotations"),
        (held_out, "val_annotations"),
    ):
        if images is not None and len(images) == 0:
            raise UserError(f"data.{name}: expected at least one image, got none: {getattr(data, name)}")
    return dataset, held_out


def _open_datasets(data: DataConfig, seed: int) -> tuple[PanopticDataset, PanopticDataset | None]:
    if data.kind == "synthetic":
        scenes = SyntheticDataset(data.synthetic_count, seed)
        if data.synthetic_val_count == 0:
            return scenes, None
        return scenes, SyntheticDataset(data.synthetic_val_count, HELD_OUT_SEED + seed)
    data = _with_local_paths(data)
    if data.kind == "yolo":
        data = _with_splits(data)
    try:
        dataset = _open(data, "", data.categories or None)
    except ClassMismatchError as error:
        # Without given categories, only LabelMe compares classes: those of data.classes with its labels.
        remedy = (
            "To train on the classes of the file, set data.categories=''"
            if data.categories
            else "Add it to data.classes"
        )
        raise ClassMismatchError(f"{error}. {remedy}") from None
    # The splits of Cityscapes share a folder.
    if not data.val_images and not (data.kind == "cityscapes" and data.val_annotations):
        return dataset, None
    # Both data sets serve one network, so both use the same classes.
    try:
        return dataset, _open(data, "val_", dataset.categories)
    except ClassMismatchError as error:
        raise ClassMismatchError(
            f"{error}. Give data.val_annotations the classes of the training data"
        ) from None


def _with_local_paths(data: DataConfig) -> DataConfig:
    """Returns settings whose paths have the home directory instead of `~`."""
    data = dataclasses.replace(data)
    for name in ("images", "annotations", "val_images", "val_annotations"):
        path = getattr(data, name)
        if "://" in path:
            raise UserError(
                f"data.{name}: expected a path on this machine, got {path!r:.60}; download it first"
            )
        setattr(data, name, os.path.expanduser(path))
    return data


def _with_splits(data: DataConfig) -> DataConfig:
    """Returns settings for yolo in which the keys of data.yaml replace what is empty."""
    annotations = data.val_annotations or data.annotations
    val_images = data.val_images
    if not val_images and annotations and DataYaml(Path(annotations)).has("val"):
        val_images = "val"
    return dataclasses.replace(
        data, images=data.images or "train", val_images=val_images, val_annotations=annotations
    )


def _open(data: DataConfig, prefix: str, categories: Categories | str | None) -> PanopticDataset:
    """Opens the data set of the settings whose names begin with `prefix`."""
    names = [f"{prefix}images", f"{prefix}annotations"]
    paths = {name: getattr(data, name) for name in names}
    if data.kind == "cityscapes":
        paths[names[0]] = paths[names[0]] or data.images
    for name, path in paths.items():
        if not path:
            raise UserError(f"data.{name}: expected a path, got nothing; set data.{name}=PATH")
    images, annotations = paths.values()
    return open_dataset(data.kind, images, annotations, categories, data.rules())
