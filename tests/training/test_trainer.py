"""Training runs of a few steps: the files that they write, and that an interrupted or distributed run ends the same."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import panfpn_fast
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.distributed import Process, process_group
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.evaluations import Evaluated
from panfpn_fast.training.trainer import Stopped, Trainer, make_model
from support.processes import run, start
from support.ranks import run_ranks
from support.tensors import assert_same_tensors
from support.training_runs import ALONE, tiny, train, train_noting_each_step, weights

SOME_WEIGHT = "fpn.output.p2.weight"


def log_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_files_of_a_run(tmp_path: Path) -> None:
    config = tiny()
    trainer = train(config, tmp_path, evaluate=lambda model: Evaluated({"PQ": float(not model.training)}))
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"loss", "loss_mask", "loss_semantic", "learning_rate", "images_per_second"} <= lines[1].keys()
    assert lines[0]["learning_rate"] == 0.01
    assert lines[3]["learning_rate"] == pytest.approx(0.001)
    assert lines[4] == {"step": 4, "PQ": 1.0}
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(config)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "best.pth",
        "checkpoint_00000002.pth",
        "checkpoint_00000004.pth",
    ]
    trainer.save_result(tmp_path / "model.pth")
    loaded = panfpn_fast.load(tmp_path / "model.pth")
    assert loaded.config == trainer.model.config
    assert_same_tensors(weights(loaded), weights(trainer.model))


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    first = weights(train(tiny(), tmp_path / "a").model)
    # The processes that load images and the state of the global random generator do not matter.
    torch.rand(7)
    assert_same_tensors(weights(train(tiny(workers=2), tmp_path / "b").model), first)
    other = weights(train(tiny(seed=1), tmp_path / "c").model)
    assert not torch.equal(other[SOME_WEIGHT], first[SOME_WEIGHT])


@pytest.mark.parametrize(
    "changes", [{}, {"solver": {"ema": 0.5}}, {"precision": "bfloat16"}, {"alternate": True}], ids=str
)
def test_resumed_run_ends_in_the_same_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tiny(**dict(changes)), tmp_path / "whole")
    part = tmp_path / "part"

    def stop(_: PanopticFPN) -> Evaluated:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the checkpoint of step 2
        train(tiny(evaluate_every=2, **dict(changes)), part, evaluate=stop)
    resumed = train(tiny(**dict(changes)), part, resume=True)
    assert_same_tensors(weights(resumed.model), weights(whole.model))
    if whole.average is not None:
        assert resumed.average is not None
        assert_same_tensors(resumed.average.state, whole.average.state)
        assert not torch.equal(whole.average.state[SOME_WEIGHT], weights(whole.model)[SOME_WEIGHT])


def test_sigterm_saves_and_resumes(tmp_path: Path) -> None:
    whole = train(tiny(), tmp_path / "whole")
    part = tmp_path / "part"

    def ask(_: PanopticFPN) -> Evaluated:
        os.kill(os.getpid(), signal.SIGTERM)
        return Evaluated({})

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="after step 1; --resume"):
        train(tiny(evaluate_every=1, checkpoint_every=100), part, evaluate=ask)
    assert signal.getsignal(signal.SIGTERM) == before
    # A run that continued and was killed while it wrote leaves a log like this.
    with open(part / "log.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 7.0}\n{"step": 3, "lo')
    resumed = train(tiny(), part, resume=True)
    assert_same_tensors(weights(resumed.model), weights(whole.model))
    assert [line["step"] for line in log_lines(part) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_saves(number: signal.Signals, tmp_path: Path) -> None:
    """Terminals and schedulers also send the signal to the processes that load images."""
    code = f"""
from pathlib import Path
from support.training_runs import tiny, train
from panfpn_fast.training.trainer import Stopped
try:
    train(tiny(solver={{"steps": 100000}}, workers=2, checkpoint_every=100000), Path({str(tmp_path)!r}))
except Stopped as stopped:
    print(stopped)
"""
    log = tmp_path / "log.jsonl"
    with start([sys.executable, "-c", code]) as process:
        process.wait_for(lambda: log.exists() and log.read_text() != "")
        process.send_to_group(number)
        done = process.finish()
        assert done.returncode == 0
        assert "--resume continues" in done.stdout
    assert list(tmp_path.glob("checkpoint_*.pth"))


def test_error_ends_the_run_and_its_loaders(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from support.training_runs import tiny, train
def fail(model):
    raise TypeError("planted")
train(tiny(workers=2, evaluate_every=1), Path({str(tmp_path)!r}), evaluate=fail)
"""
    done = run([sys.executable, "-c", code], check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "TypeError: planted"


_RUN = """
import torch; torch.set_num_threads(1)
from pathlib import Path
from support.training_runs import tiny, train
trainer = train(tiny(solver={{"steps": 12}}, checkpoint_every=1), Path({out!r}), resume=True)
torch.save(trainer.model.state_dict(), {result!r})
"""


def command_of_run(out: Path) -> tuple[list[str], Path]:
    """Returns the command of a run that can be resumed, and the file to which it writes its final weights."""
    result = out.with_suffix(".weights")
    return [sys.executable, "-c", _RUN.format(out=str(out), result=str(result))], result


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    command, expected = command_of_run(tmp_path / "whole")
    with start(command) as whole:
        command, found = command_of_run(tmp_path / "part")
        with start(command) as killed:
            killed.wait_for(lambda: any((tmp_path / "part").glob("checkpoint_*")))
            # The signal can arrive at any moment, usually during a step or while a file is written.
            killed.send(signal.SIGKILL)
            assert killed.finish().returncode == -signal.SIGKILL
        run(command)
        assert whole.finish().returncode == 0
    assert_same_tensors(torch.load(found), torch.load(expected))


_TWO = """
import torch; torch.set_num_threads(1)
from pathlib import Path
from panfpn_fast.distributed import process_group
from support.training_runs import train_noting_each_step
with process_group("cpu") as process:
    assert process.world_size == 2
    noted = train_noting_each_step(Path({out!r}), process)
    torch.save(noted, f"{out}/rank{{process.rank}}.weights")
"""


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_a_run_is_resumed_by_another_number_of_processes(counts: tuple[int, int], tmp_path: Path) -> None:
    for steps, count in zip((2, 3), counts, strict=True):

        def run_part(rank: int, steps: int = steps, count: int = count) -> None:
            with process_group("cpu") as process:
                assert process.world_size == count
                config = tiny(solver={"steps": steps})
                dataset = SyntheticDataset(8, config.seed)
                model = make_model(config, dataset)
                Trainer(config, dataset, model, tmp_path / "parts", process, resume=True, quiet=True).run()

        run_ranks(count, run_part)
    whole = train(tiny(solver={"steps": 3}), tmp_path / "whole")
    start, end = (
        torch.load(tmp_path / "parts" / f"checkpoint_{step:08}.pth", weights_only=True) for step in (2, 3)
    )
    assert end["step"] == 3
    for name, expected in weights(whole.model).items():
        # Gradients are summed in a different order, so rounding can change which proposals are used.
        before = start["model"][name].float()
        allowed = 1e-2 * (expected.float() - before).norm() + 1e-5 * expected.float().norm()
        assert (end["model"][name].float() - expected.float()).norm() <= allowed, name


def test_only_the_runs_own_checkpoints_are_deleted_and_resumed(tmp_path: Path) -> None:
    for name in ("checkpoint_best.pth", "checkpoint_00000000_copy.pth", "checkpoint_x.pth"):
        (tmp_path / name).write_text("a copy that the user made")
    train(tiny(solver={"steps": 3}, checkpoint_every=1), tmp_path)
    resumed = train(tiny(solver={"steps": 4}, checkpoint_every=1), tmp_path, resume=True)
    assert resumed.step == 4
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint_00000000_copy.pth",
        "checkpoint_00000003.pth",
        "checkpoint_00000004.pth",
        "checkpoint_best.pth",
        "checkpoint_x.pth",
    ]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]\n", b"{}\n", b'{"step": null}\n', b'{"st'])
def test_damaged_log_is_cut_off(line: bytes, tmp_path: Path) -> None:
    train(tiny(solver={"steps": 1}), tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + line)
    train(tiny(solver={"steps": 2}), tmp_path, resume=True)
    assert [entry["step"] for entry in log_lines(tmp_path)] == [1, 2]


def test_tensorboard_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages raise various errors where their versions do not fit together."""

    def fail(name: str) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr("panfpn_fast.training.trackers.importlib.import_module", fail)
    with pytest.warns(UserWarning, match="TensorBoard's files are not written: Descriptors cannot"):
        train(tiny(solver={"steps": 1}), tmp_path)
    assert log_lines(tmp_path)


def test_network_with_other_classes_is_rejected(tmp_path: Path) -> None:
    config, dataset = tiny(), SyntheticDataset(8, 0)
    model = PanopticFPN(**config.model, num_things=4, num_stuff=4)
    message = (
        r"model: its classes \(numbered\) are not the data set's \(synthetic\): "
        r"things\[0\] is 'disk' with id 1 instead of 'thing 1' with id 1\. Data: 1 disk, 2 box, 3 triangle, 4 ring and "
        r"4 more\. Network: 1 thing 1, .* and 4 more\. Leave out model\.categories"
    )
    with pytest.raises(ValueError, match=message):
        Trainer(config, dataset, model, tmp_path, ALONE)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_TWO.format(out=str(tmp_path)))
    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script])
    ranks = [torch.load(tmp_path / f"rank{rank}.weights") for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert_same_tensors(second, first)

    one = train_noting_each_step(tmp_path / "one", ALONE)
    assert_same_tensors(ranks[0][0], one[0])
    for name, before in one[0].items():
        # Gradients are summed in a different order. After the first step, rounding may change which proposals are used.
        after = one[1][name].float()
        allowed = 1e-4 * (after - before).norm() + torch.finfo(torch.float32).eps * after.norm()
        assert (ranks[0][1][name] - after).norm() <= allowed, name
    # Only rank 0 writes the log; its losses are means over the images of all ranks.
    together, alone = (
        [line["loss"] for line in log_lines(out) if "loss" in line] for out in (tmp_path, tmp_path / "one")
    )
    assert together == pytest.approx(alone, rel=1e-3)


def test_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is not finite after step \d.*loss_mask"):
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


def test_batch_size_must_be_a_multiple_of_the_processes(tmp_path: Path) -> None:
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


def test_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_00000002.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"checkpoint_00000002\.pth: cannot be read"):
        train(tiny(), tmp_path, resume=True)
