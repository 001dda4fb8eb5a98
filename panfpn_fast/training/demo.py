"""A network trained from nothing on synthetic scenes, in minutes on a CPU, and what it has learned."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
from panfpn_fast.distributed import Process
from panfpn_fast.evaluation import evaluate, format_table
from panfpn_fast.inference import Predictor
from panfpn_fast.inference.coco_format import atomic_write, save_png
from panfpn_fast.inference.visualize import draw_panoptic
from panfpn_fast.training.config import TrainConfig, get_train_preset
from panfpn_fast.training.trainer import Trainer, make_model

_PICTURES = 8
_ENLARGE = 2


def run_demo(out: Path, steps: int | None = None, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Trains the tiny preset, evaluates it on scenes that it has not seen, and draws some.

    Args:
        out: Folder for metrics.json, model.pth and the pictures.
        steps: Of training; None: the preset's.
        seed: Of weights and scenes.
        quiet: No progress bars and no table.

    Returns:
        What metrics.json holds: PQ, SQ, RQ, things, stuff (PQ each, from 0 to 100) and seconds.
    """
    begin = time.perf_counter()
    config = dataclasses.replace(get_train_preset("tiny"), seed=seed)
    if steps is not None:
        config = stretch(config, steps)
    dataset = SyntheticDataset(config.data.synthetic_count, seed)
    held_out = SyntheticDataset(config.data.synthetic_val_count, HELD_OUT_SEED + seed)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # nobody resumes a run of minutes
        process = Process(0, 1, torch.device("cpu"))
        trainer = Trainer(config, dataset, make_model(config, dataset), Path(folder), process, quiet=quiet)
        trainer.run()
    trainer.save_result(out / "model.pth")

    predictor = Predictor(
        trainer.model, "cpu", short_edge=config.data.val_short_edge, max_edge=config.data.val_max_edge
    )
    result = evaluate(predictor, held_out, with_ap=False, quiet=quiet)
    summary = result["summary"]
    metrics = {name: summary[name] for name in ("PQ", "SQ", "RQ")}
    metrics |= {"things": summary["PQ_things"], "stuff": summary["PQ_stuff"]}
    metrics["seconds"] = time.perf_counter() - begin
    with atomic_write(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=1).encode())
    save_png(gallery(predictor, held_out), out / "gallery.png")
    if not quiet:
        print(format_table(result))
        print(f"\n{metrics['seconds']:.0f} s; pictures (input, truth, prediction): {out / 'gallery.png'}")
    return metrics


def stretch(config: TrainConfig, steps: int) -> TrainConfig:
    """The same schedule over another number of steps."""
    factor = steps / config.solver.steps
    solver = dataclasses.replace(
        config.solver,
        steps=steps,
        milestones=[int(milestone * factor) for milestone in config.solver.milestones],
        warmup_steps=int(config.solver.warmup_steps * min(factor, 1)),
    )
    return dataclasses.replace(config, solver=solver)


def gallery(predictor: Predictor, dataset: SyntheticDataset) -> Image.Image:
    """Rows of input, truth and prediction, side by side, each pixel enlarged."""
    height, width = (side * _ENLARGE for side in dataset.size)
    count = min(_PICTURES, len(dataset))
    sheet = Image.new("RGB", (3 * width, count * height))
    for index in range(count):
        sample = dataset.load(index)
        image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        result = predictor(image)
        truth = [
            (
                row + 1,
                (dataset.categories.things if isthing else dataset.categories.stuff)[label - (not isthing)],
            )
            for row, (isthing, label) in enumerate(
                zip(sample.isthing.tolist(), sample.label.tolist(), strict=True)
            )
        ]
        found = [(segment.id, result.category(segment)) for segment in result.segments]
        maps = ((sample.segments.numpy(), truth), (result.panoptic.numpy(), found))
        large = image.repeat(_ENLARGE, 0).repeat(_ENLARGE, 1)
        drawn = [
            draw_panoptic(large, ids.repeat(_ENLARGE, 0).repeat(_ENLARGE, 1), table) for ids, table in maps
        ]
        for column, picture in enumerate([Image.fromarray(large), *drawn]):
            sheet.paste(picture, (column * width, index * height))
    return sheet
