"""Trains a small network on synthetic scenes, in minutes on a CPU, and shows what it learned."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.data.images import save_png
from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
from panfpn_fast.distributed import Process
from panfpn_fast.inference import Predictor
from panfpn_fast.metrics.evaluation import evaluate
from panfpn_fast.metrics.tables import format_table
from panfpn_fast.training.config import TrainConfig, get_train_preset
from panfpn_fast.training.gallery import gallery
from panfpn_fast.training.initialize import initialize
from panfpn_fast.training.trainer import Trainer, make_model

_PICTURES = 8


def train_on_scenes(
    out: Path, steps: int | None = None, seed: int = 0, quiet: bool = False, workers: int | None = None
) -> dict[str, Any]:
    """Trains the network of the package on scenes, evaluates it on unseen scenes, and draws some of them.

    Args:
        out: Folder for metrics.json, model.pth and gallery.png.
        steps: Number of training steps; None for the preset's.
        seed: Seed of the scenes and of the weights of new layers.
        quiet: Whether to hide progress bars and the table.
        workers: Number of processes that make scenes; None for the preset's. They do not change the results.

    Returns:
        The content of metrics.json: PQ, SQ, RQ, things and stuff (their PQ, from 0 to 100), and seconds.

    Raises:
        UserError: If a file cannot be written to `out`, before the first step, or a value is invalid.
    """
    begin = time.perf_counter()
    config = _recipe(seed)
    if steps is not None:
        config = stretch(config, steps)
    if workers is not None:
        config = dataclasses.replace(config, workers=workers)
    config.check()
    for name in ("metrics.json", "model.pth", "gallery.png"):
        prepare_file(out / name, "out")
    dataset = SyntheticDataset(config.data.synthetic_count, seed)
    held_out = SyntheticDataset(config.data.synthetic_val_count, HELD_OUT_SEED + seed)
    with tempfile.TemporaryDirectory() as folder:  # a run of minutes is not resumed
        process = Process(0, 1, torch.device("cpu"))
        model = make_model(config, dataset)
        initialize(model, config.init)
        trainer = Trainer(config, dataset, model, Path(folder), process, quiet=quiet)
        trainer.run()
    trainer.save_result(out / "model.pth")

    predictor = Predictor(trainer.model, "cpu", instances="panoptic")
    result = evaluate(predictor, held_out, with_ap=False, quiet=quiet, workers=config.workers)
    summary = result["summary"]
    metrics = {name: summary[name] for name in ("PQ", "SQ", "RQ")}
    metrics |= {"things": summary["PQ_things"], "stuff": summary["PQ_stuff"]}
    metrics["seconds"] = time.perf_counter() - begin
    with atomic_write(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    save_png(gallery(predictor, held_out, _PICTURES), out / "gallery.png")
    if not quiet:
        print(format_table(result))
        print(f"\n{metrics['seconds']:.0f} s; pictures (input, truth, prediction): {out / 'gallery.png'}")
    return metrics


def _recipe(seed: int) -> TrainConfig:
    """Returns the preset `tiny` with anchors that fit the shapes, and a schedule that ends with a useful network.

    Shapes have 20 to 64 pixels, for which P2 and P3 have fine features. Boxes are the last class that is learned:
    a network with random initial weights needs about a thousand steps to distinguish them from disks.
    """
    config = get_train_preset("tiny")
    return dataclasses.replace(
        config,
        seed=seed,
        init="builtin://nuclei",
        lambda_semantic=0.5,
        box_samples=64,
        model={**config.model, "anchor_sizes": [24, 48, 96, 192, 384]},
        solver=dataclasses.replace(
            config.solver,
            steps=900,
            optimizer="adamw",
            learning_rate=0.002,
            weight_decay=0.05,
            schedule="cosine",
            milestones=[],
            ema=0.99,
        ),
    )


def stretch(config: TrainConfig, steps: int) -> TrainConfig:
    """Returns a configuration with the same schedule over another number of steps."""
    factor = steps / config.solver.steps
    solver = dataclasses.replace(
        config.solver,
        steps=steps,
        milestones=[int(milestone * factor) for milestone in config.solver.milestones],
        warmup_steps=int(config.solver.warmup_steps * min(factor, 1)),
    )
    return dataclasses.replace(config, solver=solver)
