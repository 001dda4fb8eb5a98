"""Measures this machine and records the results: `python -m benchmarks.scripts.record [pytest options]`.

Runs the benchmarks on the GPU if torch finds one, else on the CPU. Writes the JSON to
`benchmarks/results/<device>/<cuda or cpu>.json`, then rewrites the tables and plots with `benchmarks.scripts.report`.
Further options are passed to pytest, such as `--full`, or `-m "not cuda"` for the CPU of a machine with a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from ..harness.measuring import device_name
from .report.results import RESULTS, ROOT


def directory_name(device: str, cores: int | None) -> str:
    """Converts the name of a device to a directory name, such as `intel-xeon-2.5ghz-2-cores` or `nvidia-h200`.

    Args:
        device: The model name of the device.
        cores: The number of threads used on a CPU, None for a GPU.
    """
    text = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@", " ", device.lower())
    text = re.sub(r"(\d)0+ghz", r"\1ghz", text)
    words = re.findall(r"[a-z0-9.]+", text.replace(" with ", " "))
    return "-".join(words if cores is None else [*words, str(cores), "cores"])


def _target(options: list[str]) -> Path:
    cuda = torch.cuda.is_available() and "not cuda" not in options
    device = torch.device("cuda" if cuda else "cpu")
    directory = directory_name(device_name(device), None if cuda else torch.get_num_threads())
    return RESULTS / directory / f"{device.type}.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, options = parser.parse_known_args()
    target = _target(options)
    only = ["-m", "cuda"] if target.stem == "cuda" and "-m" not in options else []
    target.parent.mkdir(parents=True, exist_ok=True)
    # The run writes to another file first, so that an interrupted run keeps the previous results.
    unfinished = target.with_suffix(".unfinished")
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", *only, *options]
    status = subprocess.run(
        [sys.executable, *command, f"--benchmark-json={unfinished}"], cwd=ROOT, check=False
    ).returncode
    if status != 0 or not unfinished.exists() or unfinished.stat().st_size == 0:
        unfinished.unlink(missing_ok=True)
        print(f"Not all benchmarks ran, so {target.relative_to(ROOT)} is unchanged.")
        return status or 1
    os.replace(unfinished, target)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.scripts.report"], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
