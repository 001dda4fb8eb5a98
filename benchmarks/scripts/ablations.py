"""Runs the paper's ablations at small scale on synthetic scenes: `python -m benchmarks.scripts.ablations --json FILE`.

Each variant is the tiny preset with one setting changed. It is trained for the same number of steps from several seeds
and evaluated on the same held-out scenes. The script prints a Markdown table of the means over the seeds and the spread
between them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

FIGURES = ("PQ", "PQ_things", "PQ_stuff", "mIoU", "mask_AP")

SHARED, TWO = "shared network (lambda_s 1, sum, 64 channels, joint)", "two networks, merged"
VARIANTS: dict[str, dict[str, Any]] = {
    SHARED: {},
    "lambda_s 0.25": {"lambda_semantic": 0.25},
    "lambda_s 0.5": {"lambda_semantic": 0.5},
    "lambda_s 2": {"lambda_semantic": 2.0},
    "concatenation": {"model": {"semantic_fusion": "concat"}},
    "128 channels": {"model": {"semantic_channels": 128}},
    "256 channels": {"model": {"semantic_channels": 256}},
    "alternating": {"alternate": True},
    TWO: {},
}


def _config(steps: int, seed: int, changes: dict[str, Any]) -> Any:
    from panfpn_fast.demo.scenes import stretch
    from panfpn_fast.training.config import get_train_preset

    config = stretch(get_train_preset("tiny"), steps)
    changes = changes | {"model": config.model | changes.get("model", {}), "seed": seed, "workers": 0}
    return dataclasses.replace(config, **changes)


def _train(config: Any) -> Any:
    """Returns the trained network."""
    import torch

    from panfpn_fast.data.synthetic import SyntheticDataset
    from panfpn_fast.distributed import Process
    from panfpn_fast.training.trainer import Trainer, make_model

    dataset = SyntheticDataset(config.data.synthetic_count, config.seed)
    with tempfile.TemporaryDirectory() as directory:
        process = Process(0, 1, torch.device("cpu"))
        trainer = Trainer(config, dataset, make_model(config, dataset), Path(directory), process, quiet=True)
        trainer.run()
    return trainer.model.eval()


def run(job: tuple[str, int, int]) -> dict[str, Any]:
    """Trains and evaluates one variant with one seed, on one thread.

    Args:
        job: Name of the variant, seed and number of steps.

    Returns:
        The settings of the run and its figures.
    """
    name, seed, steps = job
    import torch

    from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
    from panfpn_fast.inference import Predictor
    from panfpn_fast.metrics.evaluation import evaluate
    from panfpn_fast.models import TwoNetworks

    torch.set_num_threads(1)
    begin = time.perf_counter()
    config = _config(steps, seed, VARIANTS[name])
    if name == TWO:
        parts = [
            _train(dataclasses.replace(config, model=config.model | {"tasks": [task]}))
            for task in ("instance", "semantic")
        ]
        model = TwoNetworks(*parts)
    else:
        model = _train(config)
    seconds = time.perf_counter() - begin
    result = evaluate(Predictor(model, "cpu"), SyntheticDataset(100, HELD_OUT_SEED), quiet=True)
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": seconds,
        **{figure: result["summary"][figure] for figure in FIGURES},
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Formats the means over the seeds as a Markdown table; ± is half the range between the seeds."""
    lines = [
        f"| variant | parameters | {' | '.join(FIGURES)} |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    for name in VARIANTS:
        mine = [run for run in runs if run["variant"] == name]
        if not mine:
            continue
        cells = [name, f"{mine[0]['parameters'] / 1e6:.2f} M"]
        for figure in FIGURES:
            values = [run[figure] for run in mine]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of each training run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="training runs per variant (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="*", help="run only variants whose names contain one of these strings"
    )
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    names = [name for name in VARIANTS if not args.only or any(part in name for part in args.only)]
    jobs = [(name, seed, args.steps) for seed in range(args.seeds) for name in names]
    # Each run gets one thread, because small convolutions gain less from a second thread than from a second run in
    # parallel.
    workers = max(1, len(os.sched_getaffinity(0)))
    runs: list[dict[str, Any]] = []
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            runs.append(done.result())
            print(json.dumps(runs[-1]), flush=True)
            if args.json is not None:
                content = {"date": datetime.date.today().isoformat(), "runs": runs}
                args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{table(runs)}")


if __name__ == "__main__":
    main()
