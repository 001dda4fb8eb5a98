"""Loggers of other projects to which a run reports: TensorBoard, Weights & Biases, and MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from panfpn_fast._errors import UserError, one_line
from panfpn_fast._files import atomic_write

_IDS = "trackers.json"
"""Name of the file with the ids that the services gave to a run, so that a resumed run continues there."""


class Tracker(Protocol):
    """Receives the figures and pictures of a run."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Receives figures by name."""
        ...

    def pictures(self, step: int, pictures: Image.Image) -> None:
        """Receives the pictures of an evaluation."""
        ...

    def close(self) -> None:
        """Ends the report."""
        ...


def check_installed(names: Sequence[str]) -> None:
    """Checks that loggers are installed.

    Raises:
        UserError: If one is not; the message names it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"loggers: {name} is not installed; run pip install {name}, or leave it out of loggers"
            )


def start_trackers(
    folder: Path, names: Sequence[str], settings: Mapping[str, Any], resumed: bool
) -> list[Tracker]:
    """Starts TensorBoard, if it is installed, and the loggers of the setting `loggers`.

    Args:
        folder: Folder of the run.
        names: "wandb", "mlflow", both or none.
        settings: The settings of the run, which the loggers show.
        resumed: Whether the run continues; the loggers then continue, too, as far as they are known from before.

    Raises:
        UserError: If a logger cannot start; the message names it.
    """
    trackers = [writer for writer in [_tensorboard(folder)] if writer is not None]
    path = folder / _IDS
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if resumed and path.exists() else {}
    except ValueError:
        before = {}
    ids = dict(before) if isinstance(before, dict) else {}
    for name in dict.fromkeys(names):
        try:
            tracker = (Wandb if name == "wandb" else MLflow)(folder, settings, ids.get(name))
        except Exception as error:  # whatever the library raises
            for started in trackers:
                started.close()
            raise UserError(
                f"loggers: {name} cannot start: {one_line(error):.300}; see its documentation, or "
                "leave it out of loggers"
            ) from error
        ids[name] = tracker.id
        trackers.append(tracker)
    if names:
        with atomic_write(path) as file:
            file.write(json.dumps(ids).encode())
    return trackers


def _tensorboard(folder: Path) -> Tracker | None:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    except Exception as error:  # TypeError, AttributeError: its packages do not fit together
        warnings.warn(f"TensorBoard's files are not written: {one_line(error):.80}", stacklevel=2)
        return None
    return TensorBoard(tensorboard.SummaryWriter(str(folder / "tensorboard")))


class TensorBoard:
    """Writes files for TensorBoard."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes scalars."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Image.Image) -> None:
        """Writes an image."""
        self._writer.add_image("validation", np.asarray(pictures), step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


class Wandb:
    """Reports to Weights & Biases, as its own variables (WANDB_PROJECT, WANDB_MODE) say."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], id_: str | None) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "panfpn_fast"),
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(settings),
            id=id_,
            resume="allow",
        )
        # With an axis of its own, a resumed run may repeat steps; wandb's counter only goes up.
        self._run.define_metric("*", step_metric="step")

    @property
    def id(self) -> str:
        """The id of the run."""
        return str(self._run.id)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends figures."""
        self._run.log({"step": step, **figures})

    def pictures(self, step: int, pictures: Image.Image) -> None:
        """Sends an image."""
        self._run.log({"step": step, "validation": self._wandb.Image(pictures)})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class MLflow:
    """Reports to MLflow, as its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME) say."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], id_: str | None) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._run = self._mlflow.start_run(run_id=id_, run_name=None if id_ else folder.resolve().name)
        self._mlflow.log_dict(dict(settings), "settings.json")

    @property
    def id(self) -> str:
        """The id of the run."""
        return str(self._run.info.run_id)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends the figures that are numbers, because not every store of MLflow takes NaN."""
        numbers = {name: value for name, value in figures.items() if not math.isnan(value)}
        self._mlflow.log_metrics(numbers, step=step)

    def pictures(self, step: int, pictures: Image.Image) -> None:
        """Sends an image."""
        self._mlflow.log_image(pictures, f"validation/{step:08}.png")

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()
