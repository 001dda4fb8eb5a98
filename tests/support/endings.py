"""Ends runs of the command line in many ways, each in a forked process of its own.

Started as a script by tests/training/test_endings.py, because forks of one process import torch only once.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import panfpn_fast
from panfpn_fast.cli.main import main
from panfpn_fast.data.synthetic import HELD_OUT_SEED, SyntheticDataset
from panfpn_fast.inference import Predictor
from panfpn_fast.training.run_state import Checkpoints
from panfpn_fast.training.trainer import Trainer, make_model
from support.training_runs import tiny

SECONDS = 40
"""Time limit of each run. A run takes about a second on an idle core."""

TINY = [
    *("--preset", "tiny", "--device", "cpu"),
    *("data.synthetic_count=8", "data.synthetic_val_count=3", "data.short_edges=[64]", "data.val_short_edge=64"),
    *("model.fpn_channels=16", "model.semantic_channels=16", "model.semantic_groups=4"),
    *("model.box_head_channels=32", "model.mask_head_channels=16", "model.mask_head_convs=1"),
    *("model.rpn_post_nms_topk=50", "solver.batch_size=2", "solver.warmup_steps=0", "solver.steps=3"),
    *("checkpoint_every=1", "evaluate_every=2", "log_every=1"),
]  # fmt: skip


class Case(NamedTuple):
    """A command, the phase in which it ends, the kind of the end, and the number of loader processes."""

    command: str
    phase: str
    kind: str
    workers: int

    @property
    def name(self) -> str:
        """A name for a folder."""
        return "-".join(map(str, self))


def _end(kind: str) -> None:
    if kind == "error":
        raise TypeError("planted")
    if kind == "full_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "no_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Planted")
    if kind == "killed_loader":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hanging_loader":
        os.killpg(0, signal.SIGTERM)
        time.sleep(1000)
    if kind in ("SIGTERM", "SIGINT"):  # to all processes, as schedulers and terminals do
        os.killpg(0, getattr(signal, kind))


def _plant(owner: Any, name: str, call: int, end: Callable[[], None], when: Callable[[Any], bool]) -> None:
    """Makes the n-th call of a method end the run."""
    original, calls = getattr(owner, name), 0

    def planted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += when(self)
        if calls == call:
            calls += 1
            end()
        return original(self, *args, **kwargs)

    setattr(owner, name, planted)


def _plant_end(case: Case) -> None:
    def end() -> None:
        if case.kind == "full_disk" and case.phase in ("checkpoint", "saving"):
            # torch.save reports this limit as it does a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        else:
            _end(case.kind)

    optimizer = torch.optim.AdamW if case.command == "demo" else torch.optim.SGD
    owner, method, call = {
        "loading": (SyntheticDataset, "load", 3),
        "step": (optimizer, "step", 2),
        "checkpoint": (Checkpoints, "save", 2),
        "evaluation": (Predictor, "__call__", 2),
        "saving": (Trainer, "save_result", 1),
    }[case.phase]
    if case.kind == "not_finite":
        _plant(owner, method, call, lambda: None, lambda _: True)
        _spoil_weights(case.phase)
        return
    held_out = case.command == "eval"

    def when(self: Any) -> bool:
        return case.phase != "loading" or (self.seed >= HELD_OUT_SEED) == held_out

    _plant(owner, method, call, end, when)


def _spoil_weights(phase: str) -> None:
    original, steps = torch.optim.SGD.step, 0

    def step(self: torch.optim.SGD, closure: Any = None) -> Any:
        nonlocal steps
        found = original(self, closure)
        steps += 1
        if steps == 2:
            parameter = self.param_groups[0]["params"][0]
            with torch.no_grad():
                # In the phase "checkpoint" the weights are finite, but not their losses.
                parameter.fill_(torch.inf if phase == "step" else 3e38)
        return found

    torch.optim.SGD.step = step  # type: ignore[method-assign]


def _arguments(case: Case, out: Path) -> list[str]:
    if case.command == "train":
        return ["train", "--out", str(out), *TINY, f"workers={case.workers}"]
    if case.command == "demo":
        return ["demo", "--train", "--out", str(out), "--steps", "3"]
    weights = str(out.parent / "weights.pth")
    return ["eval", "--kind", "synthetic", "--weights", weights, "--short-edge", "64", "--no-ap",
            "--device", "cpu"]  # fmt: skip


def _start(case: Case, out: Path) -> int:
    """Forks; the child never returns, and exits as any Python process does."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), stream)
    _plant_end(case)
    sys.exit(main(_arguments(case, out)))


def _group_is_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _finish(pid: int, begin: float) -> dict[str, Any]:
    status = 0
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found or time.monotonic() > begin + SECONDS:
            break
        time.sleep(0.02)
    ended = bool(found)
    if ended:
        grace = time.monotonic() + 3
        while _group_is_alive(pid) and time.monotonic() < grace:
            time.sleep(0.02)
    left = _group_is_alive(pid)
    if left:
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status) if ended else None, "left": left}


def run_all(root: Path, cases: list[Case]) -> None:
    """Runs the cases, two at a time, and writes `result.json` into the folder of each."""
    torch.set_num_threads(1)
    panfpn_fast.save(make_model(tiny(), SyntheticDataset(8, 0)), root / "weights.pth")
    waiting: list[tuple[int, Path, float]] = []
    for case in [*cases, None, None]:
        if len(waiting) == 2 or (case is None and waiting):
            pid, out, begin = waiting.pop(0)
            (out / "result.json").write_text(json.dumps(_finish(pid, begin)))
        if case is not None:
            out = root / case.name
            out.mkdir()
            waiting.append((_start(case, out), out, time.monotonic()))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), [Case(*case) for case in json.loads(sys.argv[2])])
