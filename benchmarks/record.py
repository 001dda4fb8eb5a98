"""Measures this machine and writes it down: `python -m benchmarks.record [pytest options]`.

Runs the benchmarks of the GPU if torch finds one, else of the CPU; keeps the JSON as
`benchmarks/results/<device>/<cuda or cpu>.json`; then writes the tables and plots anew, as `benchmarks.report` does.
Options go to pytest: `--full`, `-m "not cuda"` for the CPU of a machine with a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .measuring import device_name
from .report.results import RESULTS, ROOT


def folder_name(device: str, cores: int | None) -> str:
    """A device's name as a folder's: `intel-xeon-2.5ghz-2-cores`, `nvidia-h200`.

    Args:
        device: What it calls itself.
        cores: Of a CPU, how many threads are used.
    """
    text = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@", " ", device.lower())
    text = re.sub(r"(\d)0+ghz", r"\1ghz", text)
    words = re.findall(r"[a-z0-9.]+", text)
    return "-".join(words if cores is None else [*words, str(cores), "cores"])


def _target(options: list[str]) -> Path:
    cuda = torch.cuda.is_available() and "not cuda" not in options
    device = torch.device("cuda" if cuda else "cpu")
    folder = folder_name(device_name(device), None if cuda else torch.get_num_threads())
    return RESULTS / folder / f"{device.type}.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, options = parser.parse_known_args()
    target = _target(options)
    only = ["-m", "cuda"] if target.stem == "cuda" and "-m" not in options else []
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside it first: a run that is cut short leaves the results of before.
    unfinished = target.with_suffix(".unfinished")
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", *only, *options]
    status = subprocess.run(
        [sys.executable, *command, f"--benchmark-json={unfinished}"], cwd=ROOT, check=False
    ).returncode
    if status != 0 or not unfinished.exists() or unfinished.stat().st_size == 0:
        unfinished.unlink(missing_ok=True)
        print(f"the benchmarks did not all run, so {target.relative_to(ROOT)} was left as it is")
        return status or 1
    os.replace(unfinished, target)
    return subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
