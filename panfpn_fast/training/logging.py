"""What a run tells while it goes on: lines of JSON, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from panfpn_fast.evaluation import without_nan


def _summary_writer(folder: Path) -> Any:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return tensorboard.SummaryWriter(str(folder / "tensorboard"))


def _forget_after(step: int, path: Path) -> None:
    """Takes the lines of later steps out of a log: the run was killed after them, and will take them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # half a line
            break
    path.write_text("".join(kept), encoding="utf-8")


class TrainingLog:
    """Writes `log.jsonl` in a folder, and the same to TensorBoard; moves a progress bar.

    Args:
        folder: Where to write; lines follow those of the run that this one continues.
        steps: How many there will be.
        start: How many there were before.
        device: Whose memory is shown.
        quiet: No progress bar.
    """

    def __init__(
        self, folder: Path, steps: int, start: int, device: torch.device, quiet: bool = False
    ) -> None:
        path = folder / "log.jsonl"
        _forget_after(start, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
        self._tensorboard = _summary_writer(folder)
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=quiet, dynamic_ncols=True)
        self._device = device
        self._since = (start, time.perf_counter())

    def advance(self) -> None:
        """One step was taken."""
        self._bar.update(1)

    def losses(self, step: int, losses: Mapping[str, float], rate: float, batch_size: int) -> None:
        """Notes the losses of a step, with the speed since the last such note."""
        before, then = self._since
        now = time.perf_counter()
        self._since = (step, now)
        line: dict[str, float] = {"step": step, "loss": sum(losses.values()), **losses, "learning_rate": rate}
        if step > before:
            line["images_per_second"] = (step - before) * batch_size / (now - then)
        if self._device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        self._write(line)
        shown = {"loss": f"{line['loss']:.3f}"}
        shown |= {name.removeprefix("loss_"): f"{loss:.2f}" for name, loss in losses.items()}
        for name, unit in (("images_per_second", "img/s"), ("memory_gib", "GiB")):
            if name in line:
                shown[unit] = f"{line[name]:.1f}"
        self._bar.set_postfix(shown)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes an evaluation."""
        self._write({"step": step, **metrics})
        self.say("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            tqdm.write(message)

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, line: Mapping[str, float]) -> None:
        self._file.write(json.dumps(without_nan(dict(line)), allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in line.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, int(line["step"]))

    def __enter__(self) -> TrainingLog:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()
