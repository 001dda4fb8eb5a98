"""The log of a run: lines of JSON, TensorBoard if it is installed, and a progress bar."""

from __future__ import annotations

import importlib
import json
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from panfpn_fast._errors import one_line
from panfpn_fast.metrics.tables import without_nan


def _summary_writer(folder: Path) -> Any:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    except Exception as error:  # TypeError, AttributeError: its packages do not fit together
        warnings.warn(f"TensorBoard's files are not written: {one_line(error):.80}", stacklevel=2)
        return None
    return tensorboard.SummaryWriter(str(folder / "tensorboard"))


def _forget_after(step: int, path: Path) -> None:
    """Removes the lines after a step from a log; the run was killed after them and will repeat those steps."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, LookupError):  # an incomplete or a damaged line
            break
    path.write_text("".join(kept), encoding="utf-8")


class TrainingLog:
    """Writes `log.jsonl` and the same figures to TensorBoard, and moves a progress bar.

    Args:
        folder: Folder to write to; a resumed run appends to its log.
        steps: Number of steps of the whole run.
        start: Number of steps taken before.
        device: Device whose memory is shown.
        quiet: Whether to hide the progress bar.
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
        """Moves the progress bar by one step."""
        self._bar.update(1)

    def losses(self, step: int, losses: Mapping[str, float], rate: float, batch_size: int) -> None:
        """Logs the losses of a step, with the speed since the previous call."""
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
        """Logs the figures of an evaluation."""
        self._write({"step": step, **metrics})
        self.say("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            tqdm.write(message)

    def close(self) -> None:
        """Closes the progress bar and the files."""
        with ExitStack() as stack:  # closes all, also if the disk is full
            for part in (self._tensorboard, self._file, self._bar):
                if part is not None:
                    stack.callback(part.close)

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
        """Closes the log."""
        self.close()
