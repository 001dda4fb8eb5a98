"""Training: settings, the trainer, losses, and the state of a run.

A run from Python, with the same parts as `panfpn-fast train`:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from panfpn_fast.distributed import process_group
    >>> from panfpn_fast.training import make_trainer, read_settings
    >>> config = read_settings("tiny", None, ["solver.steps=100", "solver.learning_rate=0.01"])
    >>> with tempfile.TemporaryDirectory() as out, process_group("cpu") as process:
    ...     trainer = make_trainer(config, Path(out), process)
    ...     trainer.step  # trainer.run() takes the steps
    0
"""

from __future__ import annotations

from panfpn_fast.training.config import DataConfig, SolverConfig, TrainConfig, get_train_preset
from panfpn_fast.training.curves import draw_curves
from panfpn_fast.training.evaluations import Evaluated
from panfpn_fast.training.network import TrainingNetwork
from panfpn_fast.training.settings import read_settings, settings_of_run
from panfpn_fast.training.setup import make_datasets, make_trainer
from panfpn_fast.training.trainer import Stopped, Trainer, make_model
from panfpn_fast.training.validation import Validation

__all__ = [
    "DataConfig",
    "Evaluated",
    "SolverConfig",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingNetwork",
    "Validation",
    "draw_curves",
    "get_train_preset",
    "make_datasets",
    "make_model",
    "make_trainer",
    "read_settings",
    "settings_of_run",
]
