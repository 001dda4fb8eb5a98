"""Measures the host time of the Triton ops without a GPU: `python -m benchmarks.scripts.host_time`.

Writes docs/host_time.md. Triton's driver is replaced by one that compiles and launches nothing, and the ops run on CPU
tensors, so only the time that the host needs per call is measured. Not included are the launches themselves, about 2 to
4 us each, and the difference between the two memory allocators.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it at its import

import torch
import triton

from panfpn_fast import ops

from ..harness.measuring import device_name
from .report.results import ROOT

sys.path.append(str(ROOT / "tests"))  # the tests use the same fake GPU and the same calls
from support import fake_gpu
from support.head_calls import call, head_calls
from support.kernel_checks import implemented_in_triton

PAGE = ROOT / "docs" / "host_time.md"
_ROUNDS, _CALLS = 7, 200
_INTRODUCTION = """\
# Host time

The host time, in microseconds, of a call of each op that Triton implements. It is the time of the calling thread
with a driver that compiles and launches nothing, on CPU tensors. The launches themselves, about 2 to 4 us each, are
not included. The kernels of these ops often take less time than the host on a GPU, so at these sizes the host
decides, unless a CUDA graph replays the calls.

"first" is a call that records the steps of the host function as a plan; its kernels have been compiled before. Each new
set of shapes, strides, dtypes and settings needs such a call. The other calls repeat the steps of their plan. "grad
mode" is a call with gradients enabled of which none is needed.
"""


def microseconds(function: Callable[[], Any]) -> float:
    """Measures a function: the CPU time of this thread, the least average of several rounds."""
    function()
    rounds = timeit.repeat(function, number=_CALLS, repeat=_ROUNDS, timer=time.thread_time)
    return min(rounds) / _CALLS * 1e6


def dispatcher_rows(gpu: fake_gpu.FakeGpu) -> list[str]:
    """Measures the dispatcher ops; returns the lines of their table."""
    from panfpn_fast.ops.triton import IMPLEMENTATIONS

    rows = []
    for name, args in head_calls().items():
        implementation = IMPLEMENTATIONS[name]
        function = partial(call, name, args)

        def first(
            function: Callable[[], Any] = function, plans: dict[Any, Any] = implementation._plans
        ) -> None:
            plans.clear()
            function()

        with torch.inference_mode():
            recorded, planned = microseconds(first), microseconds(function)
            (plan,) = implementation._plans.values()
            gpu.launches = []
            function()
            launches, gpu.launches = len(gpu.launches), None
        steps = f"{launches} launches, {len(plan.steps) - launches} allocations"
        rows.append(f"| `{name}` | {planned:.1f} | {microseconds(function):.1f} | {recorded:.0f} | {steps} |")
    return rows


def public_rows() -> list[str]:
    """Measures the public functions, which check their arguments; returns the lines of their table."""
    of = head_calls()
    x, conv_weight, groups, eps = of["conv3x3_statistics"]
    y, _mean, _rstd, gn_weight, gn_bias, matrix, bias, residual = of["group_norm_relu_project"]
    logits, target = of["upsample_cross_entropy"][:2]
    functions: dict[str, Callable[[], Any]] = {
        "group_norm_relu_upsample": lambda: ops.group_norm_relu_upsample(y, gn_weight, gn_bias, groups),
        "conv_gn_relu_upsample": lambda: ops.conv_gn_relu_upsample(
            x, conv_weight, gn_weight, gn_bias, groups, eps
        ),
        "conv_gn_relu_project": lambda: ops.conv_gn_relu_project(
            x, conv_weight, gn_weight, gn_bias, groups, matrix, bias, eps, residual
        ),
        "upsample_argmax": lambda: ops.upsample_argmax(logits, 4),
        "upsample_cross_entropy": lambda: ops.upsample_cross_entropy(logits, target, 4),
    }
    with torch.inference_mode():
        return [f"| `{name}` | {microseconds(function):.1f} |" for name, function in functions.items()]


def page() -> str:
    """Measures everything; returns the page in Markdown."""
    torch.set_num_threads(1)
    gpu = fake_gpu.install()
    gpu.launches = None
    cpu = torch.device("cpu")
    with implemented_in_triton(cpu):
        lines = [
            _INTRODUCTION,
            f"`python -m benchmarks.scripts.host_time` on {device_name(cpu)}, torch {torch.__version__}, "
            f"Triton {triton.__version__}, {datetime.date.today().isoformat()}.",
            "",
            "| dispatcher op | inference mode | grad mode | first | steps of the plan |",
            "|---|--:|--:|--:|---|",
            *dispatcher_rows(gpu),
            "",
            "| public function, with its checks | inference mode |",
            "|---|--:|",
            *public_rows(),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="the file to write (default: docs/host_time.md)"
    )
    options = parser.parse_args()
    text = page()
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
