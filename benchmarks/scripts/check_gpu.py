"""Checks and measures the library on a GPU within ten minutes: `python -m benchmarks.scripts.check_gpu --out DIR`.

The stages come in the order of what they tell: does it load, is each op right, are all results right, does
compute-sanitizer find a fault, how fast is it. Each stage is a process with its own time limit, so that none takes the
time of all. `--out` gets the output of each stage and, after each one, `summary.json`. The last stages write the JSON
of the benchmarks; `python -m benchmarks.scripts.report` turns it into tables.

`--dry-run` runs a small part of every stage on the CPU, which tests the command itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .report.results import ROOT

# The stages run in the checkout. Python would take its sources, which have binaries in an editable installation alone.
_LOAD = (
    "import sys; sys.path.remove(''); import torch; from panfpn_fast import _load; print(_load.build_report()); "
    "_load.native(torch.device(sys.argv[1]))"
)
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Stage:
    """A process of Python with its time limit.

    Attributes:
        name: Name of the stage and of its output.
        arguments: Arguments of Python. {out} and {name} are replaced.
        on_gpu: Further arguments on a GPU.
        in_dry_run: Further arguments in a dry run.
        seconds: Time limit.
        tool: The tool of compute-sanitizer under which the process runs on a GPU, or None.
    """

    name: str
    arguments: tuple[str, ...]
    on_gpu: tuple[str, ...]
    in_dry_run: tuple[str, ...]
    seconds: int
    tool: str | None = None

    def command(self, out: Path, dry_run: bool) -> list[str]:
        """Returns the command of the stage."""
        arguments = [a.format(out=out, name=self.name) for a in self.arguments]
        if dry_run:
            return [sys.executable, *arguments, *self.in_dry_run]
        sanitizer = (
            () if self.tool is None else ("compute-sanitizer", "--tool", self.tool, "--error-exitcode=99")
        )
        return [*sanitizer, sys.executable, *arguments, *self.on_gpu]


def stages() -> list[Stage]:
    """Returns the stages in order. All but the benchmarks take seven minutes at most."""
    # Under the sanitizer, a kernel takes up to a hundred times as long.
    small = ("tests/ops", "-m", "cuda", "-k", "test_checks and float32")
    op = ("tests/ops/test_nms.py", "-k", "drops_above_the_threshold and cpu")
    row = ("benchmarks/ops/test_nms.py", "-k", "cpu and 1000_boxes")
    network = ("benchmarks/networks/test_semantic_head.py", "-k", "cpu", "--collect-only")
    of_ops, of_networks = ((f"benchmarks/{kind}", "-m", "cuda") for kind in ("ops", "networks"))
    tests = (
        "tests/kernels",
        "tests/models",
        "tests/data",
        "tests/inference",
        "tests/integrations",
        "-m",
        "cuda",
    )
    timed = (*_PYTEST, "--benchmark-only", "--benchmark-max-time=0.3", "--benchmark-json={out}/{name}.json")
    return [
        Stage("load", ("-c", _LOAD), ("cuda",), ("cpu",), 50),
        Stage("one-call-per-op", (*_PYTEST, "--benchmark-disable"), of_ops, row, 80),
        Stage("ops", _PYTEST, ("tests/ops", "-m", "cuda"), op, 80),
        Stage("networks", _PYTEST, tests, op, 60),
        Stage("graphs", ("-m", "benchmarks.scripts.check_graphs"), (), ("--device", "cpu"), 50),
        Stage("memcheck", _PYTEST, small, op, 50, "memcheck"),
        Stage("racecheck", _PYTEST, small, op, 50, "racecheck"),
        Stage("benchmarks-of-ops", timed, of_ops, row, 150),
        Stage("benchmarks-of-networks", timed, of_networks, network, 150),
    ]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage. `result` begins with "passed", "failed", "timed out" or "not run"; the reason follows."""

    stage: str
    result: str
    seconds: float
    last_line: str


def run_stage(stage: Stage, out: Path, limit: float, dry_run: bool) -> Outcome:
    """Runs a stage for at most `limit` seconds; its output goes to a file as it comes."""
    command = stage.command(out, dry_run)
    if shutil.which(command[0]) is None:
        return Outcome(stage.name, f"not run: {command[0]} is not on PATH", 0.0, "")
    if limit < 10:
        return Outcome(stage.name, "not run: no time is left", 0.0, "")
    # Without torch's cache of memory, an access beyond a tensor leaves its allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage.tool == "memcheck" else {}
    log = out / f"{stage.name}.log"
    begin = time.monotonic()
    # A session of its own: a time limit also ends the processes that the stage has started.
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            result = "passed" if process.wait(limit) == 0 else f"failed: exit code {process.returncode}"
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            result = f"timed out after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last_line = next((line for line in reversed(lines) if line.strip()), "")
    return Outcome(stage.name, result, round(time.monotonic() - begin, 1), last_line)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all stages passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; made if it is missing"
    )
    parser.add_argument("--minutes", type=float, default=10, help="time for all stages (default: 10)")
    parser.add_argument("--dry-run", action="store_true", help="run a small part of each stage on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --dry-run tests the command on the CPU")
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes:g}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    for stage in stages():
        outcome = run_stage(stage, out, min(stage.seconds, end - time.monotonic()), options.dry_run)
        outcomes.append(outcome)
        (out / "summary.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
        print(f"{outcome.seconds:6.1f} s  {outcome.stage}: {outcome.result}  {outcome.last_line}", flush=True)
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
