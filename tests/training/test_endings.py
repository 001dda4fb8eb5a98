"""Every run ends, with the right exit code and message, without losing a good checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from panfpn_fast._errors import UserError
from support.endings import Case
from support.processes import environment, run
from support.training_runs import tiny, train

PHASES = ("loading", "step", "checkpoint", "evaluation", "saving")
KINDS = ("error", "full_disk", "no_memory", "SIGTERM", "SIGINT")

CASES = [
    *(Case("train", phase, kind, workers) for phase in PHASES for kind in KINDS for workers in (0, 2)),
    *(Case("train", phase, "not_finite", workers) for phase in ("step", "checkpoint") for workers in (0, 2)),
    Case("train", "loading", "killed_loader", 2),
    Case("train", "loading", "hanging_loader", 2),
    Case("demo", "step", "SIGINT", 1),
    Case("demo", "step", "full_disk", 1),
    *(Case("eval", phase, kind, 1) for phase in ("loading", "evaluation") for kind in KINDS),
    Case("eval", "loading", "killed_loader", 1),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has a folder for each case."""
    pytest.importorskip("omegaconf", reason="the extra [train] is not installed")
    root = tmp_path_factory.mktemp("endings")
    script = Path(__file__).parents[1] / "support" / "endings.py"
    run([sys.executable, script, root, json.dumps(CASES)], env=environment(OMP_NUM_THREADS="1"), seconds=500)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_run_ends_and_keeps_what_is_good(case: Case, runs: Path) -> None:
    out = runs / case.name
    result = json.loads((out / "result.json").read_text())
    stdout, stderr = ((out / name).read_text() for name in ("stdout", "stderr"))
    print(stdout, stderr, sep="\n")  # shown if the test fails
    assert result["code"] is not None, "the run did not end"
    assert not result["left"], "processes are left"

    signalled = case.kind in ("SIGTERM", "SIGINT", "hanging_loader")
    assert result["code"] == (130 if signalled else 1 if case.kind == "error" else 2)
    last = stderr.strip().splitlines()[-1] if stderr.strip() else ""
    if case.kind == "error":
        assert "Traceback" in stderr
        assert "TypeError: planted" in last or last == "TypeError: planted"
    else:
        assert "Traceback" not in stderr
    said = {
        "full_disk": "File too large"
        if case.phase in ("checkpoint", "saving")
        else "No space left on device",
        "no_memory": "out of memory",
        "not_finite": "is not finite after step 2",
        "killed_loader": "a process that loads images was killed or failed",
    }
    assert said.get(case.kind, "") in last
    assert not list(out.glob(".*")), "a temporary file is left"
    if case.command != "train":
        return

    if signalled and case.phase != "saving":
        assert "--resume continues" in stdout
    assert not (out / "model.pth").exists()
    kept = sorted(out.glob("checkpoint_*.pth"))
    assert kept or case.phase == "loading"
    for path in kept:
        state = torch.load(path, weights_only=True)
        assert all(
            tensor.isfinite().all() for tensor in state["model"].values() if tensor.is_floating_point()
        )
        assert case.kind != "not_finite" or state["step"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"semantic_channels": 32}}, "model.semantic_channels is 16 there and 32 now"),
        ({"freeze_at": 2}, "freeze_at is 0 there and 2 now"),
        ({"precision": "float16"}, "precision is 'float32' there and 'float16' now"),
        ({"solver": {"ema": 0.5}}, "solver.ema is 0.0 there and 0.5 now"),
        ({"solver": {"steps": 1}}, "solver.steps: expected at least 2, the steps of .*, got 1"),
    ],
    ids=str,
)
def test_resume_that_does_not_fit_changes_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train(tiny(solver={"steps": 2}), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(tiny(**changes), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("random_state", None),
        ("random_state", torch.zeros(3)),
        ("optimizer", {}),
        ("optimizer", {"param_groups": [1]}),
        ("model", {"a": 1}),
        ("scaler", {"scale": "x"}),
    ],
    ids=str,
)
def test_checkpoint_with_a_damaged_entry_is_named(entry: str, value: Any, tmp_path: Path) -> None:
    train(tiny(solver={"steps": 1}), tmp_path)
    path = tmp_path / "checkpoint_00000001.pth"
    torch.save({**torch.load(path, weights_only=True), entry: value}, path)
    with pytest.raises(UserError, match=r"checkpoint_00000001\.pth"):
        train(tiny(), tmp_path, resume=True)


def test_checkpoint_without_an_entry_is_named(tmp_path: Path) -> None:
    torch.save({"step": 2}, tmp_path / "checkpoint_00000002.pth")
    with pytest.raises(UserError, match=r"checkpoint_00000002\.pth: not a checkpoint of a training run"):
        train(tiny(), tmp_path, resume=True)
