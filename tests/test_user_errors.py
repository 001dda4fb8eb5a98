"""Errors of the system and of missing packages end a command with one line that has a remedy."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

import panfpn_fast
from panfpn_fast._errors import UserError
from panfpn_fast.cli._common import reporting_user_errors
from panfpn_fast.cli.main import main
from panfpn_fast.data import read_categories
from support.coco_samples import write_coco
from support.training_samples import small_model


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.png"),
            "a.png: Too many open files. Try --workers 0, or raise the limit: ulimit -n 4096",
        ),
        (
            OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
            "[Errno 23] Too many open files in system. Try --workers 0, or raise the limit: ulimit -n 4096",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png"), "a.png: No space left on device"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that loads images was killed or failed; memory or file descriptors may have run out. Try "
            "--workers 0 (DataLoader worker (pid 7) is killed by signal: Killed.)",
        ),
        (MemoryError(), "out of memory. Try --workers 0 (MemoryError)"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory. Try --workers 0 (CUDA out of memory. Tried to allocate 2 GiB)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_system(error: Exception, message: str) -> None:
    with pytest.raises(UserError) as caught, reporting_user_errors("Try --workers 0"):
        raise error
    assert str(caught.value) == message


def test_other_errors_stay() -> None:
    for error in (RuntimeError("a bug"), BrokenPipeError(), UserError("a setting")):
        with pytest.raises(type(error)) as caught, reporting_user_errors("Try --workers 0"):
            raise error
        assert caught.value is error


def test_average_precision_without_pycocotools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path)
    truth = tmp_path / "truth.json"
    classes = read_categories(truth)
    panfpn_fast.save(small_model(categories=classes, num_things=1, num_stuff=1), tmp_path / "model.pth")
    # Other tests may have imported its modules.
    for name in ("pycocotools", *(name for name in sys.modules if name.startswith("pycocotools."))):
        monkeypatch.setitem(sys.modules, name, None)
    command = ["eval", "--weights", str(tmp_path / "model.pth"), "--device", "cpu", "--workers", "0"]
    command += ["--images", str(tmp_path / "photos"), "--annotations", str(truth), "--short-edge", "32"]
    assert main(command) == 2
    message = "Average precision needs pycocotools: pip install pycocotools, or use --no-ap\n"
    assert capsys.readouterr().err.endswith(message)
    assert main([*command, "--no-ap"]) == 0
