"""Compares predictions with and without CUDA graphs: `python -m benchmarks.scripts.check_graphs`.

For photographs of several sizes, a `Predictor` that replays graphs must agree with one that does not. The table has the
time from the photograph to the result, how often the host waited for the GPU other than for the one event, and the
memory that torch has reserved by then. The network is a stand-in with random weights, in float32.

`--device cpu` compares a small network on a stand-in for a GPU, without times. It tests the command itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

from panfpn_fast.data.images import ImageArray
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.inference.graphs import GraphPredictor
from panfpn_fast.models import PanopticFPN

from ..harness import inputs
from ..harness.agreement import PanopticMap, same_maps
from ..networks.stand_in import stand_in
from .report.results import ROOT

# The last photograph has the padded shape of the first.
SIZES = ((480, 640), (640, 480), (427, 640), (1200, 1600))
_SMALL_SIZES = ((48, 64), (120, 160))
_ROUNDS = 20
# TF32 rounds to ten bits, and the padded shapes of the heads sum in another order.
_LEAST = {"cuda": 0.98, "cpu": 0.999}


def predictors(device: str) -> tuple[Predictor, Predictor]:
    """Returns a predictor with graphs and one without them."""
    if device == "cuda":
        network = stand_in("resnet50", torch.device("cuda", torch.cuda.current_device()))
        with_graphs, without = (Predictor(network, network.device, graphs=graphs) for graphs in (True, False))
        return with_graphs, without
    sys.path.append(str(ROOT / "tests"))  # the tests use the same stand-in for a GPU
    from support.host_gpu import HostGpu

    network = stand_in("resnet10_narrow", torch.device("cpu"))
    with_graphs, without = (Predictor(network, "cpu", short_edge=64, max_edge=96) for _ in range(2))
    assert isinstance(with_graphs.model, PanopticFPN)
    with_graphs._graphs = GraphPredictor(with_graphs.model, 64, 96, HostGpu())
    return with_graphs, without


def _map(result: PanopticResult) -> PanopticMap:
    isthing = torch.tensor([segment.isthing for segment in result.segments])
    label = torch.tensor([segment.class_index for segment in result.segments])
    return PanopticMap(result.panoptic, isthing, label)


def _waits(predict: Callable[[], object]) -> int:
    """Counts the operations of a prediction that make the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            predict()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def _milliseconds(predict: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        predict()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all predictions agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --device cpu tests the command")
    with_graphs, without = predictors(device)
    failures = 0
    for size in SIZES if device == "cuda" else _SMALL_SIZES:
        photograph: ImageArray = inputs.image(size).permute(1, 2, 0).contiguous().numpy()
        found, expected = with_graphs(photograph), without(photograph)
        line = f"{size[0]} x {size[1]}: "
        try:
            same_maps(_LEAST[device])([_map(found)], [_map(expected)])
            line += "agree"
        except AssertionError as error:
            failures += 1
            line += f"differ: {error}"
        if device == "cuda":
            for name, predictor in (("graphs", with_graphs), ("without", without)):

                def predict(
                    predictor: Predictor = predictor, photograph: ImageArray = photograph
                ) -> PanopticResult:
                    return predictor(photograph)

                line += f"; {name} {_milliseconds(predict):.2f} ms, {_waits(predict)} waits"
            line += f"; {torch.cuda.memory_reserved() / 2**20:.0f} MiB reserved"
        print(line, flush=True)
    print("graphs and the exact path agree" if failures == 0 else f"{failures} sizes differ")
    return 0 if failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
