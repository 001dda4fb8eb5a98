"""Runs the commands of docs/batch.md as two machines would: two torchrun that meet at a port and share a folder."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import panfpn_fast
from support.processes import Running, environment, start
from support.training_samples import small_model


def start_machines(stack: ExitStack, folder: Path) -> list[Running]:
    """Starts `predict` for the images in `folder/in` on two machines."""
    panfpn_fast.save(small_model(), folder / "model.pth")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "predict"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        *meeting,
    ]
    arguments = [
        folder / "in",
        "--out",
        folder / "out",
        "--weights",
        folder / "model.pth",
        "--short-edge",
        "32",
    ]
    command = [*torchrun, "-m", "panfpn_fast.cli", "predict", *arguments, "--device", "cpu"]
    env = environment(OMP_NUM_THREADS="1")
    return [stack.enter_context(start(command, env=env)) for _ in range(2)]


def make_images(folder: Path, count: int) -> list[str]:
    (folder / "in").mkdir()
    names = [f"img{number:03}" for number in range(count)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{name}.png")
    return names


def test_machines_share_the_images(tmp_path: Path) -> None:
    names = make_images(tmp_path, 5)
    with ExitStack() as stack:
        done = [machine.finish() for machine in start_machines(stack, tmp_path)]
    assert [one.returncode for one in done] == [0, 0]
    assert sorted(one.stdout.count(" -> ") for one in done) == [2, 3]
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [annotation["image_id"] for annotation in content["annotations"]] == names
    assert sorted(path.stem for path in (tmp_path / "out" / "predictions").iterdir()) == names


@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_machine_ends_the_run(tmp_path: Path, lost: int) -> None:
    make_images(tmp_path, 600)
    maps = tmp_path / "out" / "predictions"
    with ExitStack() as stack:
        machines = start_machines(stack, tmp_path)
        machines[lost].wait_for(lambda: any(maps.glob("img*.png")))
        machines[lost].kill()
        assert machines[1 - lost].finish().returncode == 1
    assert any(maps.glob("img*.png"))
