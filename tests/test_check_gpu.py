"""The command that checks a GPU, in a dry run on the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.op_checks import OPS
from support.processes import run
from support.repository import repository


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    repository(monkeypatch)
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    return importlib.import_module("benchmarks.scripts.check_gpu")


def test_every_stage_runs(script: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scripts.check_gpu", "--dry-run", "--out", tmp_path]
    done = run(command, cwd=script.ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [stage.name for stage in script.stages()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(one["stage"], one["result"]) for one in summary] == [(name, "passed") for name in names]
    assert all((tmp_path / f"{name}.log").stat().st_size > 0 for name in names)
    assert json.loads((tmp_path / "benchmarks-of-ops.json").read_text())["benchmarks"]


def test_graphs_that_differ_fail(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = importlib.import_module("benchmarks.scripts.check_graphs")
    pair = check.predictors("cpu")
    graphs = pair[0]._graphs

    def mirrored(image: Any) -> Any:
        output = graphs(image)
        return output._replace(panoptic=output.panoptic.flip(1))

    for changed, code in ((graphs, 0), (mirrored, 1)):
        pair[0]._graphs = changed
        monkeypatch.setattr(check, "predictors", lambda device: pair)
        assert check.main(["--device", "cpu"]) == code
    assert "2 sizes differ" in capsys.readouterr().out


def test_the_selection_of_the_sanitizer_has_a_test_of_each_op(script: ModuleType) -> None:
    stage = next(stage for stage in script.stages() if stage.tool == "memcheck")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-q",
        *stage.on_gpu,
    ]
    done = run(command, cwd=script.ROOT)
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    on_cuda = {f"tests/ops/test_{name}.py" for name, op in OPS.items() if op.cuda_in_csrc}
    assert on_cuda <= files


def test_the_limits_leave_time_to_measure(script: ModuleType) -> None:
    stages = script.stages()
    assert all((script.ROOT / one).is_dir() for stage in stages for one in stage.on_gpu if "/" in one)
    assert sum(stage.seconds for stage in stages if "benchmarks-" not in stage.name) <= 420


def test_a_stage_that_hangs_or_fails_does_not_stop_the_others(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "hangs": "import time; print('begun', flush=True); time.sleep(600)",
        "fails": "print('wrong result'); raise SystemExit(3)",
        "passes": "print('done')",
    }
    stages = [script.Stage(name, ("-c", code), (), (), 11) for name, code in commands.items()]
    stages.append(script.Stage("late", ("-c", ""), (), (), 5))
    monkeypatch.setattr(script, "stages", lambda: stages)
    assert script.main(["--dry-run", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(one["result"], one["last_line"]) for one in summary] == [
        ("timed out after 11 s", "begun"),
        ("failed: exit code 3", "wrong result"),
        ("passed", "done"),
        ("not run: no time is left", ""),
    ]
    assert "hangs: timed out after 11 s  begun" in capsys.readouterr().out


def test_without_a_sanitizer_its_stages_do_not_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stage = next(stage for stage in script.stages() if stage.tool == "racecheck")
    outcome = script.run_stage(stage, tmp_path, 60, dry_run=False)
    assert outcome.result == "not run: compute-sanitizer is not on PATH"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dry-run tests the command on the CPU"),
        (["--dry-run", "--minutes", "0"], "expected a positive number, got 0"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        script.main(["--out", str(tmp_path / "new"), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
