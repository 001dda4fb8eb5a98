"""Runs of a few steps: what they leave behind, and that stopping, killing and sharing them changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import panfpn_fast
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import Process
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.config import TrainConfig, get_train_preset
from panfpn_fast.training.trainer import Stopped, Trainer, make_model

ALONE = Process(0, 1, torch.device("cpu"))
STEPS = 4
SOME_WEIGHT = "fpn.output.p2.weight"


def tiny(**changes: Any) -> TrainConfig:
    """A run of a few steps on few small scenes, in this process."""
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


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def log_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    config = tiny()
    trainer = train(config, tmp_path, evaluate=lambda model: {"PQ": float(not model.training)})
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"loss", "loss_mask", "loss_semantic", "learning_rate", "images_per_second"} <= lines[1].keys()
    assert lines[0]["learning_rate"] == 0.01
    assert lines[3]["learning_rate"] == pytest.approx(0.001)
    assert lines[4] == {"step": 4, "PQ": 1.0}
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(config)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint_00000002.pth",
        "checkpoint_00000004.pth",
    ]
    trainer.save_result(tmp_path / "model.pth")
    loaded = panfpn_fast.load(tmp_path / "model.pth")
    assert loaded.config == trainer.model.config
    assert_same(weights(loaded), weights(trainer.model))


def test_the_same_seed_is_the_same_run(tmp_path: Path) -> None:
    first = weights(train(tiny(), tmp_path / "a").model)
    # Whoever loads the images, and whatever was drawn before.
    torch.rand(7)
    assert_same(weights(train(tiny(workers=2), tmp_path / "b").model), first)
    other = weights(train(tiny(seed=1), tmp_path / "c").model)
    assert not torch.equal(other[SOME_WEIGHT], first[SOME_WEIGHT])


@pytest.mark.parametrize(
    "changes", [{}, {"solver": {"ema": 0.5}}, {"precision": "bfloat16"}, {"alternate": True}], ids=str
)
def test_resumed_run_ends_in_the_same_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tiny(**dict(changes)), tmp_path / "whole")
    part = tmp_path / "part"

    def stop(_: PanopticFPN) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the checkpoint of step 2
        train(tiny(evaluate_every=2, **dict(changes)), part, evaluate=stop)
    resumed = train(tiny(**dict(changes)), part, resume=True)
    assert_same(weights(resumed.model), weights(whole.model))
    if whole.average is not None:
        assert resumed.average is not None
        assert_same(resumed.average.state, whole.average.state)
        assert not torch.equal(whole.average.state[SOME_WEIGHT], weights(whole.model)[SOME_WEIGHT])


def test_sigterm_saves_and_resumes(tmp_path: Path) -> None:
    whole = train(tiny(), tmp_path / "whole")
    part = tmp_path / "part"

    def ask(_: PanopticFPN) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 2; --resume"):
        train(tiny(evaluate_every=1, checkpoint_every=100), part, evaluate=ask)
    assert signal.getsignal(signal.SIGTERM) == before
    with open(
        part / "log.jsonl", "a"
    ) as file:  # as a run leaves it that went on, and was killed while it wrote
        file.write('{"step": 3, "loss": 7.0}\n{"step": 4, "lo')
    resumed = train(tiny(), part, resume=True)
    assert_same(weights(resumed.model), weights(whole.model))
    assert [line["step"] for line in log_lines(part) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_saves(number: signal.Signals, tmp_path: Path) -> None:
    """As Ctrl-C and schedulers send it: to those that load images too."""
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_trainer import Stopped, tiny, train
try:
    train(tiny(solver={{"steps": 100000}}, workers=2, checkpoint_every=100000), Path({str(tmp_path)!r}))
except Stopped as stopped:
    print(stopped)
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, number)
        output, error = process.communicate(timeout=300)
    assert "--resume goes on" in output, error
    assert process.returncode == 0, error
    assert list(tmp_path.glob("checkpoint_*.pth"))


_RUN = """
import sys; sys.path[:0] = [{tests!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_trainer import tiny, train
trainer = train(tiny(solver={{"steps": 12}}, checkpoint_every=1), Path({out!r}), resume=True)
torch.save(trainer.model.state_dict(), {result!r})
"""


def run_in_process(out: Path) -> tuple[subprocess.Popen[str], Path]:
    result = out.with_suffix(".weights")
    code = _RUN.format(tests=str(Path(__file__).parent), out=str(out), result=str(result))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True), result


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, expected = run_in_process(tmp_path / "whole")
    killed, _ = run_in_process(tmp_path / "part")
    while not list((tmp_path / "part").glob("checkpoint_*")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()  # at any moment: most of the time in the middle of a step or of a file
    assert killed.wait() == -signal.SIGKILL
    resumed, found = run_in_process(tmp_path / "part")
    for process in (whole, resumed):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert_same(torch.load(found), torch.load(expected))


_TWO = """
import sys; sys.path[:0] = [{tests!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
from panfpn_fast.distributed import process_group
from test_trainer import train_noting_each_step
with process_group("cpu") as process:
    assert process.world_size == 2
    noted = train_noting_each_step(Path({out!r}), process)
    torch.save(noted, f"{out}/rank{{process.rank}}.weights")
"""


def train_noting_each_step(out: Path, process: Process) -> list[dict[str, Tensor]]:
    """The weights before the first step and after each."""
    config = tiny(evaluate_every=1)
    dataset = SyntheticDataset(8, config.seed)
    model = make_model(config, dataset)
    noted = [weights(model)]

    def note(model: PanopticFPN) -> dict[str, float]:
        noted.append(weights(model))
        return {}

    Trainer(config, dataset, model, out, process, evaluate=note, quiet=True).run()
    return noted


def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.weights") for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert_same(second, first)

    one = train_noting_each_step(tmp_path / "one", ALONE)
    assert_same(ranks[0][0], one[0])
    for name, before in one[0].items():
        # Sums of gradients in another order. Later, a rounding may change which proposals are looked at.
        after = one[1][name].float()
        allowed = 1e-4 * (after - before).norm() + torch.finfo(torch.float32).eps * after.norm()
        assert (ranks[0][1][name] - after).norm() <= allowed, name
    # One process writes the log, of all the images.
    together, alone = (
        [line["loss"] for line in log_lines(out) if "loss" in line] for out in (tmp_path, tmp_path / "one")
    )
    assert together == pytest.approx(alone, rel=1e-3)


def test_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"no longer a number after step \d.*loss_mask"):
        train(tiny(solver={"learning_rate": 1e30, "clip_gradients": 0.0}), tmp_path)


def test_clipped_gradients(tmp_path: Path) -> None:
    config = tiny(solver={"clip_gradients": 1e-9, "steps": 1, "weight_decay": 0.0})
    before = weights(make_model(config, SyntheticDataset(8, 0)))
    after = weights(train(config, tmp_path).model)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-8)


def test_frozen_stages_keep_their_weights(tmp_path: Path) -> None:
    config = tiny(freeze_at=2)
    before = weights(make_model(config, SyntheticDataset(8, 0)))
    after = weights(train(config, tmp_path).model)
    kept = {
        name.split(".")[1]
        for name, tensor in before.items()
        if name.startswith("backbone") and torch.equal(tensor, after[name])
    }
    assert kept == {"conv1", "norm1", "layer1"}


def test_wrong_batch_size_for_the_processes(tmp_path: Path) -> None:
    config = tiny(solver={"batch_size": 3})
    dataset = SyntheticDataset(8, 0)
    process = Process(0, 2, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"solver\.batch_size: expected a multiple of the 2 processes, got 3"
    ):
        Trainer(config, dataset, make_model(config, dataset), tmp_path, process)


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"out: .* holds the checkpoints of another run; resume it"):
        train(tiny(), tmp_path)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_00000002.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"checkpoint_00000002\.pth: cannot be read"):
        train(tiny(), tmp_path, resume=True)
