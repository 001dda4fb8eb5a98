"""Short training runs, which tests also start in separate processes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import Process
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.config import TrainConfig, get_train_preset
from panfpn_fast.training.evaluations import Evaluated
from panfpn_fast.training.trainer import Trainer, make_model

ALONE = Process(0, 1, torch.device("cpu"))
STEPS = 4


def tiny(**changes: Any) -> TrainConfig:
    """Returns the configuration of a run of a few steps on a few small scenes, without loader processes."""
    config = get_train_preset("tiny")
    solver: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 2,
        "warmup_steps": 0,
        "milestones": [3],
        "learning_rate": 0.01,
    } | changes.pop("solver", {})
    model = config.model | {"fpn_channels": 16, "box_head_channels": 32, "mask_head_channels": 16,
                            "mask_head_convs": 1, "semantic_channels": 16, "semantic_groups": 4,
                            "rpn_post_nms_topk": 50} | changes.pop("model", {})  # fmt: skip
    data = dataclasses.replace(config.data, short_edges=[64], **changes.pop("data", {}))
    defaults: dict[str, Any] = {"workers": 0, "log_every": 1, "checkpoint_every": 2}
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        solver=dataclasses.replace(config.solver, **solver),
        **(defaults | changes),
    )


def train(config: TrainConfig, out: Path, **kwargs: Any) -> Trainer:
    dataset = SyntheticDataset(8, config.seed)
    trainer = Trainer(config, dataset, make_model(config, dataset), out, ALONE, quiet=True, **kwargs)
    trainer.run()
    return trainer


def weights(model: PanopticFPN) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_noting_each_step(out: Path, process: Process) -> list[dict[str, Tensor]]:
    """Trains and returns the weights before the first step and after each step."""
    config = tiny(evaluate_every=1)
    dataset = SyntheticDataset(8, config.seed)
    model = make_model(config, dataset)
    noted = [weights(model)]

    def note(model: PanopticFPN) -> Evaluated:
        noted.append(weights(model))
        return Evaluated({})

    Trainer(config, dataset, model, out, process, evaluate=note, quiet=True).run()
    return noted
