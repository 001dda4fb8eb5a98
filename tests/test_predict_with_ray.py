"""Runs examples/predict_with_ray.py on a local Ray: loses a process, stops and restarts, and reads Parquet."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import panfpn_fast
from panfpn_fast.inference import Predictor, decode_panoptic
from support.processes import TESTS, environment, run
from support.repository import repository
from support.training_samples import small_model

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

IMAGES = 7
NAMES = [f"img{number}" for number in range(IMAGES)]


def make_images(folder: Path) -> None:
    """Writes photos and one damaged file, to a folder and to Parquet."""
    import pyarrow
    from pyarrow import parquet

    (folder / "photos").mkdir()
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{name}.png")
    (folder / "photos" / "damaged.jpg").write_bytes(b"not an image")
    paths = sorted((folder / "photos").iterdir())
    columns = {"path": [path.name for path in paths], "bytes": [path.read_bytes() for path in paths]}
    parquet.write_table(pyarrow.table(columns), folder / "photos.parquet", row_group_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        example = repository(patch) / "examples" / "predict_with_ray.py"
    folder = tmp_path_factory.mktemp("ray")
    make_images(folder)
    panfpn_fast.save(small_model(), folder / "model.pth")
    # On a busy machine, Ray's processes would wait longer than others.
    env = environment(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    with tempfile.TemporaryDirectory(prefix="ray") as rays:  # the paths of Ray's sockets must be short
        script = TESTS / "support" / "ray_run.py"
        run([sys.executable, script, example, folder, rays], env=env)
    return folder


def predicted(folder: Path, name: str) -> Counter[str]:
    """Returns how often a run predicted each image."""
    path = folder / f"{name}.txt"
    return Counter(path.read_text().split() if path.exists() else ())


def results(folder: Path, name: str) -> dict[str, Any]:
    """Returns the annotations after a run by the ids of the images."""
    content = json.loads((folder / f"{name}.json").read_text())
    found = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    assert len(content["images"]) == len(content["annotations"]) == len(found)
    assert content["status"] == 1  # one image is damaged
    return found


def test_a_lost_process_loses_and_doubles_nothing(folder: Path) -> None:
    assert (folder / "dies").exists()
    counts = predicted(folder, "killed")
    assert set(counts) == {"damaged", *NAMES}
    assert max(counts.values()) > 1  # the batch of the lost process was repeated
    assert sorted(results(folder, "killed")) == NAMES


def test_results_are_those_of_a_predictor(folder: Path) -> None:
    predictor = Predictor(str(folder / "model.pth"), device="cpu", short_edge=32)
    found = results(folder, "restarted")
    for name in NAMES:
        result = predictor(folder / "photos" / f"{name}.png")
        pixels = np.asarray(Image.open(folder / "out" / "predictions" / f"{name}.png"))
        np.testing.assert_array_equal(decode_panoptic(pixels), result.panoptic.numpy())
        segments = [(one["id"], one["area"], one["category_id"]) for one in found[name]["segments_info"]]
        assert segments == [(one.id, one.area, one.category_id) for one in result.segments]


def test_a_restart_predicts_what_is_missing(folder: Path) -> None:
    """It reads the images from Parquet, where they have the same names."""
    assert predicted(folder, "restarted") == Counter(["img1", "img4", "damaged"])
    assert results(folder, "restarted") == results(folder, "killed")


def test_no_unfinished_file_remains(folder: Path) -> None:
    names = {path.name for path in (folder / "out" / "predictions").iterdir()}
    assert names == {f"{name}.png" for name in NAMES}
