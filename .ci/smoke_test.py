"""Checks an installed wheel: the libraries load, the examples of all ops give their results, a network predicts.

    python .ci/smoke_test.py [--cuda]

It needs nothing but the package, and works without a compiler and without a GPU. `--cuda` also fails if the wheel has
no CUDA ops.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import inspect
import sys
from pathlib import Path

import numpy as np

import panfpn_fast
from panfpn_fast import ops
from panfpn_fast._load import build_report


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true", help="the wheel must have the CUDA ops")
    wants_cuda = parser.parse_args().cuda
    report = build_report()
    for label, text in report.items():
        print(f"{label}: {text}")
    problems = [] if report["CPU ops"] == "loaded" else ["the CPU ops did not load"]
    library = Path(panfpn_fast.__file__).parent / "_C_cuda.so"
    if wants_cuda and not (library.is_file() and report["CUDA architectures"] != "none"):
        problems.append("the wheel has no CUDA ops")

    examples = 0
    for name in ops.__all__:
        if inspect.isfunction(getattr(ops, name)):
            result = doctest.testmod(importlib.import_module(f"panfpn_fast.ops.{name}"))
            examples += result.attempted
            problems += [f"the example of {name} fails"] * (result.failed > 0)
    print(f"{examples} lines of examples")
    problems += ["there are no examples"] * (examples == 0)

    network = panfpn_fast.PanopticFPN(backbone="resnet18", num_things=2, num_stuff=3)
    predicted = panfpn_fast.Predictor(network, device="cpu", short_edge=96)(np.zeros((60, 80, 3), np.uint8))
    if predicted.panoptic.shape != (60, 80):
        problems.append(f"the network predicted {tuple(predicted.panoptic.shape)} instead of (60, 80)")
    print("\n".join(problems) or "the wheel works")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
