"""Runs examples/predict_with_ray.py twice on one local Ray: `ray_run.py EXAMPLE FOLDER RAYS_FOLDER`.

FOLDER has photos/, photos.parquet and model.pth. A run appends the names of the images that it predicts to a file.
Ray sends the classes of this module to its processes, because it is `__main__`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from panfpn_fast.inference import PredictToFolder


def counting(log: Path, dies: Path) -> type[PredictToFolder]:
    """Returns a class that writes each name that it predicts to a file.

    Args:
        log: The file.
        dies: A file that the first process makes before it ends, after it has written the results of its second batch.
    """

    class Counting(PredictToFolder):
        calls = 0

        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            found = super().__call__(batch)
            with open(log, "a") as file:
                file.write("".join(f"{name}\n" for name in batch["name"]))
            self.calls += 1
            if self.calls == 2 and not dies.exists():
                dies.touch()
                os._exit(1)
            return found

    return Counting


def main() -> None:
    example, folder, rays = map(Path, sys.argv[1:])
    sys.path.insert(0, str(example.parent))
    module = importlib.import_module(example.stem)
    # Run as a program, the example would be `__main__`, which Ray sends whole.
    ray.cloudpickle.register_pickle_by_value(module)

    def run(name: str, source: str) -> None:
        options = ["--weights", folder / "model.pth", "--out", folder / "out", "--device", "cpu"]
        arguments = [folder / source, *options, "--short-edge", "32", "--rows", "2"]
        predictor = counting(folder / f"{name}.txt", folder / "dies")
        status = module.main([str(part) for part in arguments], predictor)
        content = json.loads((folder / "out" / "predictions.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(content | {"status": status}))

    memory = 100 * 2**20
    ray.init(num_cpus=2, num_gpus=0, object_store_memory=memory, include_dashboard=False, _temp_dir=str(rays))
    try:
        run("killed", "photos")
        for name in ("img1", "img4"):  # as if the run had been stopped
            (folder / "out" / "predictions" / f"{name}.png").unlink()
        run("restarted", "photos.parquet")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
