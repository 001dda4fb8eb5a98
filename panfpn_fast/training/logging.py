"""The log of a run: lines of JSON, the loggers of other projects, and a progress bar."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from panfpn_fast._errors import one_line
from panfpn_fast.data.images import save_png
from panfpn_fast.metrics.tables import without_nan
from panfpn_fast.training.evaluations import Evaluated
from panfpn_fast.training.json_lines import forget_after
from panfpn_fast.training.trackers import Tracker

LOG = "log.jsonl"
"""Name of the file with the figures of a run, in its folder."""

GALLERY = "gallery.png"
"""Name of the file with the pictures of the last evaluation, in the folder of the run."""


class TrainingLog:
    """Writes `log.jsonl`, reports the same figures to loggers of other projects, and moves a progress bar.

    Args:
        folder: Folder to write to; a resumed run appends to its log.
        steps: Number of steps of the whole run.
        start: Number of steps taken before.
        device: Device whose memory is shown.
        trackers: Loggers of other projects, which this object closes.
        quiet: Whether to hide the progress bar.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        device: torch.device,
        trackers: Sequence[Tracker] = (),
        quiet: bool = False,
    ) -> None:
        self._trackers = list(trackers)
        self._gallery = folder / GALLERY
        forget_after(folder / LOG, start)
        self._file = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()
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

    def evaluation(self, step: int, evaluated: Evaluated) -> None:
        """Logs the figures and pictures of an evaluation, and prints its table."""
        self._write({"step": step, **evaluated.figures})
        table = evaluated.table or "  ".join(
            f"{name} {value:.3f}" for name, value in evaluated.figures.items()
        )
        self.say(f"\nafter step {step}:\n{table}\n")
        pictures = evaluated.pictures
        if pictures is not None:
            save_png(pictures, self._gallery)
            self._report(lambda tracker: tracker.pictures(step, pictures))

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if not self._bar.disable:
            tqdm.write(message)

    def close(self) -> None:
        """Closes the progress bar and the files."""
        with ExitStack() as stack:  # closes all, also if the disk is full
            for part in (self._file, self._bar):
                stack.callback(part.close)
            self._report(lambda tracker: tracker.close())

    def _write(self, line: Mapping[str, float]) -> None:
        self._file.write(json.dumps(without_nan(dict(line)), allow_nan=False) + "\n")
        self._file.flush()
        figures = {name: value for name, value in line.items() if name != "step"}
        self._report(lambda tracker: tracker.figures(int(line["step"]), figures))

    def _report(self, call: Callable[[Tracker], None]) -> None:
        """Calls all loggers. One that fails is dropped with a warning: a lost server must not end a long run."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                warnings.warn(f"{name} receives no more figures: {one_line(error):.120}", stacklevel=2)

    def __enter__(self) -> TrainingLog:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the log."""
        self.close()
