"""Measures the choice between convolutions on this machine's GPU: `python -m panfpn_fast.kernels.conv_choice`.

It prints the milliseconds of each implementation and, with --save, writes the choices as `table.json` has them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from panfpn_fast.kernels import conv3x3_statistics, conv_choice

_CHANNELS = ((256, 64), (256, 128), (256, 256), (64, 64), (128, 128))
"""Of the semantic head's stages, which have 64, 128 or 256 channels and whose first reads the pyramid's 256."""

_PIXELS = (1 << 8, 1 << 20)
"""From the smallest level of a small image to the largest of a batch of 16."""


def shapes() -> Iterator[tuple[int, int, int, int, int]]:
    """N, H, W, C_in and C_out of a convolution in each class of sizes."""
    sizes = sorted(
        {conv_choice.size_class(pixels) for pixels in range(_PIXELS[0], _PIXELS[1], _PIXELS[0] // 4)}
    )
    for pixels in sizes:
        height = math.isqrt(pixels * 3 // 5)  # as of photographs
        width = -(-pixels // height)
        for in_channels, out_channels in _CHANNELS:
            yield 1, height, width, in_channels, out_channels


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m panfpn_fast.kernels.conv_choice", description=__doc__)
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the choices to this file, beside those in it"
    )
    precisions = ("bfloat16", "float16", "tf32", "float32")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions[:3])
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="N,H,W,IN,OUT",
        type=lambda text: tuple(map(int, text.split(","))),
        help="batch, height, width, channels in and out; by default one of each class of sizes of the semantic head",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no CUDA GPU here", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    measured: dict[str, str] = {}
    for precision in options.precision:
        dtype = torch.float32 if precision in ("tf32", "float32") else getattr(torch, precision)
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        for shape in options.shape or shapes():
            problem, times = conv3x3_statistics.measure(shape, dtype, device)
            best = min(times, key=times.__getitem__)
            measured[problem.key] = best
            line = ", ".join(
                f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda t: t[1])
            )
            print(f"{problem.key}: {line}", flush=True)
    if options.save is not None:
        choices = conv_choice.read_choices(options.save)
        gpu = torch.cuda.get_device_name(device)
        choices.setdefault(gpu, {}).setdefault(conv_choice.versions(), {}).update(measured)
        made = shlex.join(["python", "-m", "panfpn_fast.kernels.conv_choice", *(arguments or sys.argv[1:])])
        conv_choice.write_choices(options.save, choices, made=f"{made}, {datetime.date.today()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
