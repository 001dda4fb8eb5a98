"""Profiles the dense network layer by layer, ours and OpenVINO's: `python -m benchmarks.scripts.dense_profile`.

Writes docs/dense_profile.md. Our times are those of the operations that PyTorch dispatches; OpenVINO's come from its
own counters. Both run the network of `benchmarks/networks/test_dense_network.py`, in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from panfpn_fast.models.conv_fusion import for_prediction

from ..harness import engines, inputs
from ..harness.measuring import device_name
from ..networks.dense import Dense
from ..networks.engine_network import dense_model
from ..networks.stand_in import stand_in
from .report.results import ROOT
from .report.tables import table

PAGE = ROOT / "docs" / "dense_profile.md"

_WEIGHTS = ("W", "weight", "conv_weight")
_LEAST_SHARE = 0.005
_INTRODUCTION = """\
# Profile of the dense network

This page compares how long we and OpenVINO take for each layer of the dense part of a prediction on a CPU. The dense
part is the backbone, the FPN, the RPN's convolutions and the semantic head, here of the R-50 network at {size}, in
float32. Each figure is the median over {rounds} runs; our runs and OpenVINO's alternate. Our times are those of
the operations that PyTorch dispatches, so their total exceeds the time without the profiler by a few microseconds
per operation. OpenVINO's times come from its own counters. A convolution includes the operations that are fused into
it. `benchmarks/scripts/dense_profile.py` writes this page.
"""

Layer = tuple[str, str]
"""The kind of an operation, and its size."""

Seconds = dict[Layer, float]


class _Timer(TorchDispatchMode):
    """Adds up the seconds of each dispatched operation by its kind and size."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Seconds = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        output = found[0] if isinstance(found, (tuple, list)) else found
        if isinstance(output, Tensor):
            names = [argument.name for argument in func._schema.arguments]
            weights = [value for name, value in zip(names, args, strict=False) if name in _WEIGHTS]
            shape = tuple(weights[0].shape) if weights and isinstance(weights[0], Tensor) else None
            layer = _layer(func._schema.name.partition("::")[2], shape, tuple(output.shape))
            self.seconds[layer] += seconds
        return found


def _layer(name: str, weight: tuple[int, ...] | None, output: tuple[int, ...]) -> Layer:
    """Names a layer. `weight` is the shape [K, C, h, w] of a convolution's weights, else None."""
    pixels = f"{output[2]} x {output[3]}" if len(output) == 4 else " x ".join(map(str, output))
    if weight is None or len(weight) != 4:
        return name, pixels
    return f"convolution {weight[2]} x {weight[3]}", f"{weight[1]} to {weight[0]}, {pixels}"


class _Reorders(NamedTuple):
    """The copies that oneDNN makes in one run to change the layout of weights and of other tensors."""

    weights: float
    others: float


def _reorders(run: Callable[[], Any]) -> _Reorders:
    """Measures oneDNN's reorders, which PyTorch does not dispatch, with oneDNN's own log."""
    with _captured_stdout() as lines, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        run()
    seconds = {True: 0.0, False: 0.0}
    for line in lines:
        parts = line.strip().split(",")
        if ",exec,cpu,reorder," in line and re.fullmatch(r"[\d.]+", parts[-1]):
            sides = list(map(int, parts[-2].split("x")))
            of_weights = len(sides) == 2 or (len(sides) >= 4 and max(sides[2:]) <= 7)
            seconds[of_weights] += float(parts[-1]) / 1e3
    return _Reorders(seconds[True], seconds[False])


@contextmanager
def _captured_stdout() -> Iterator[list[str]]:
    """Collects the lines that C code prints inside the block."""
    lines: list[str] = []
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile("w+") as file:
            flush(None)
            os.dup2(file.fileno(), 1)
            try:
                yield lines
            finally:
                flush(None)
                os.dup2(saved, 1)
            file.seek(0)
            lines += file.readlines()
    finally:
        os.close(saved)


def _openvino(path: Path) -> tuple[Callable[[Tensor], Any], Callable[[], Seconds]]:
    """Compiles a network; returns a function that runs it and one that reads the counters of the last run."""
    openvino = importlib.import_module("openvino")
    model = openvino.Core().read_model(path)
    weights = {
        op.get_friendly_name(): tuple(op.input(1).get_partial_shape().to_shape())
        for op in model.get_ops()
        if op.get_type_name() == "Convolution"
    }
    compiled = openvino.Core().compile_model(
        model, "CPU", {**engines.openvino_settings(torch.float32), "PERF_COUNT": True}
    )
    shapes = {
        op.get_friendly_name(): tuple(op.output(0).get_shape())
        for op in compiled.get_runtime_model().get_ops()
        if op.get_output_size() and op.output(0).get_partial_shape().is_static
    }
    request = compiled.create_infer_request()

    def counters() -> Seconds:
        found: Seconds = defaultdict(float)
        for each in request.get_profiling_info():
            name = each.node_name
            layer = _layer(each.node_type, weights.get(name), shapes.get(name, ()))
            found[layer] += each.real_time.total_seconds()
        return dict(found)

    return lambda x: request.infer([x.numpy()], share_inputs=True), counters


def _medians(runs: list[Seconds]) -> Seconds:
    layers = dict.fromkeys(layer for run in runs for layer in run)
    return {layer: statistics.median(run.get(layer, 0.0) for run in runs) for layer in layers}


def _by_kind(found: Seconds) -> dict[str, float]:
    kinds: dict[str, float] = defaultdict(float)
    for (kind, _), seconds in found.items():
        kinds[kind] += seconds
    return kinds


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _comparison(ours: dict[Any, float], theirs: dict[Any, float]) -> list[tuple[Any, str, str]]:
    """Returns a line for each item that takes a share of the time, the slowest first."""
    least = _LEAST_SHARE * sum(ours.values())
    slowest = {item: max(ours.get(item, 0.0), theirs.get(item, 0.0)) for item in {**ours, **theirs}}
    order = sorted(slowest, key=slowest.__getitem__, reverse=True)
    return [
        (item, _milliseconds(ours.get(item)), _milliseconds(theirs.get(item)))
        for item in order
        if slowest[item] >= least
    ]


def page(size: tuple[int, int], rounds: int) -> str:
    """Measures both networks; returns the page in Markdown."""
    device = torch.device("cpu")
    network = Dense(for_prediction(stand_in("resnet50", device)))
    image = network.network.normalize(inputs.image(size))[None]
    channels_last = image.contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        path = engines.export(dense_model("resnet50"), torch.zeros(image.shape), Path(folder))
        run_theirs, counters = _openvino(path)

    def run_ours() -> None:
        network(channels_last)

    ours: list[Seconds] = []
    theirs: list[Seconds] = []
    plain: list[tuple[float, float]] = []
    with torch.no_grad():
        for number in range(rounds + 1):
            start = time.perf_counter()
            run_ours()
            middle = time.perf_counter()
            run_theirs(image)
            end = time.perf_counter()
            read = counters()
            with _Timer() as timer:
                run_ours()
            if number:  # the first run allocates and prepares
                plain.append((middle - start, end - middle))
                theirs.append(read)
                ours.append(dict(timer.seconds))
        reorders = _reorders(run_ours)
    mine, others = _medians(ours), _medians(theirs)
    totals = [statistics.median(pair) for pair in zip(*plain, strict=True)]
    versions = f"torch {torch.__version__}, OpenVINO {importlib.import_module('openvino').__version__}"
    kinds = _comparison(_by_kind(mine), _by_kind(others))
    layers = [(*layer, *times) for layer, *times in _comparison(mine, others)]
    return "\n".join(
        [
            _INTRODUCTION.format(size=" x ".join(map(str, size)), rounds=rounds),
            f"{device_name(device)}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}.",
            "",
            f"The whole run without the profiler takes ours {_milliseconds(totals[0])} ms and OpenVINO "
            f"{_milliseconds(totals[1])} ms. The layers add up to {_milliseconds(sum(mine.values()))} and "
            f"{_milliseconds(sum(others.values()))} ms. Inside our convolutions, oneDNN copies weights to its own "
            f"layout for {_milliseconds(reorders.weights)} ms "
            f"and other tensors for {_milliseconds(reorders.others)} ms.",
            "",
            "## By kind",
            "",
            *table(("operation", "ours, ms", "OpenVINO, ms"), kinds, left=1),
            "",
            "## By layer",
            "",
            "Layers of the same kind and size are added up. Those below half a percent of our time are left out.",
            "",
            *table(("operation", "size", "ours, ms", "OpenVINO, ms"), layers, left=2),
            "",
        ]
    )


def main() -> None:
    """Measures, prints and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="file to write (default: docs/dense_profile.md)"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=inputs.PADDED,
        metavar=("HEIGHT", "WIDTH"),
        help="multiples of 32",
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each network (default: %(default)s)")
    options = parser.parse_args()
    problem = engines.problem("OpenVINO", torch.device("cpu"))
    if problem is not None:
        sys.exit(problem)
    text = page(tuple(options.size), options.rounds)
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
