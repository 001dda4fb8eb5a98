"""Measures the table of convolutions that ships with the package, on this machine's GPU.

    python -m benchmarks.scripts.conv_choice --save panfpn_fast/ops/triton/conv_choice.json

It prints the milliseconds of each implementation and, with --save, adds the fastest ones to the file.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from panfpn_fast.ops.triton import _conv_choice as conv_choice
from panfpn_fast.ops.triton import _conv_timing as conv_timing
from panfpn_fast.ops.triton import conv3x3_statistics

_CHANNELS = ((256, 64), (256, 128), (256, 256), (64, 64), (128, 128))
"""Channels of the semantic head's stages: they have 64, 128 or 256, and the first stage reads the pyramid's 256."""

_PIXELS = (1 << 8, 1 << 20)
"""Pixels of the smallest level of a small image, and of the largest level of a batch of 16."""


def problems(gpu: str, precision: str) -> Iterator[conv_choice.Problem]:
    """Yields a convolution in each class of sizes, for each pair of channels."""
    sizes = sorted(
        {conv_choice.size_class(pixels) for pixels in range(_PIXELS[0], _PIXELS[1], _PIXELS[0] // 4)}
    )
    for pixels in sizes:
        for channels in _CHANNELS:
            yield conv_choice.Problem(gpu, precision, pixels, *channels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scripts.conv_choice", description=__doc__)
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the fastest ones to this file")
    precisions = ("bfloat16", "float16", "tf32", "float32")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions[:3])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no CUDA GPU here", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = conv3x3_statistics.gpu_of(device.index)
    fastest: dict[str, str] = {}
    for precision in options.precision:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        for problem in problems(str(gpu.name), precision):
            times = conv_timing.measure(problem, conv3x3_statistics.rank(problem, gpu), device)
            fastest[problem.key] = min(times, key=times.__getitem__)
            line = ", ".join(
                f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda t: t[1])
            )
            print(f"{problem.key}: {line}", flush=True)
    if options.save is not None:
        choices = conv_choice.read_choices(options.save) if options.save.exists() else {}
        choices.setdefault(str(gpu.name), {}).setdefault(conv_timing.versions(), {}).update(fastest)
        made = shlex.join(["python", "-m", "benchmarks.scripts.conv_choice", *(arguments or sys.argv[1:])])
        conv_choice.write_choices(options.save, choices, made=f"{made}, {datetime.date.today()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
