"""`panfpn-fast bench`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from panfpn_fast.training.command import SettingsError

if TYPE_CHECKING:
    import torch

    from panfpn_fast.models import PanopticFPN

_DESCRIPTION = """\
Times a network's prediction on images of noise, and prints milliseconds (median, and the 20 % and 80 % quantiles) of
the whole and of its parts, and images per second. Images are on the device already; reading and resizing are not
counted.
"""


def add_bench(commands: Any) -> None:
    """Adds the command to the command line."""
    bench = commands.add_parser("bench", help="time a network's prediction", description=_DESCRIPTION)
    network = bench.add_mutually_exclusive_group()
    network.add_argument(
        "--weights", metavar="NAME_OR_PATH", help="checkpoint file, or the name of a published checkpoint"
    )
    network.add_argument(
        "--preset",
        default="panoptic_fpn_r50",
        metavar="NAME",
        help="a network with random weights, which finds less than a trained one (default: %(default)s)",
    )
    bench.add_argument(
        "--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"), help="default: 800 1216"
    )
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: %(default)s)")
    bench.add_argument(
        "--runs", type=int, default=20, metavar="N", help="default: %(default)s, after 3 others"
    )
    bench.add_argument("--device", help="such as cpu (default: a CUDA GPU if there is one, else cpu)")
    bench.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the network computes in (default: %(default)s)",
    )
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import torch

    import panfpn_fast
    from panfpn_fast._device import check_device
    from panfpn_fast.models.fusion import for_prediction

    for name, least in (("size", min(args.size)), ("batch", args.batch), ("runs", args.runs)):
        if least < 1:
            raise SettingsError(f"--{name}: expected positive whole numbers, got {least}")
    try:
        device = check_device(args.device)
        if args.weights is None:
            torch.manual_seed(0)
            model = panfpn_fast.PanopticFPN.from_config(args.preset).eval()
        else:
            model = panfpn_fast.load(args.weights)
    except (OSError, ValueError, ImportError) as error:  # the messages name the file or what is missing
        raise SettingsError(" ".join(str(error).split())) from error
    # As a Predictor has it.
    model = for_prediction(model).to(device, getattr(torch, args.dtype), memory_format=torch.channels_last)  # type: ignore[call-overload]
    height, width = args.size
    images = torch.randint(0, 256, (args.batch, 3, height, width), dtype=torch.uint8).to(device)
    times = _measure(model, list(images), args.runs)
    print(f"{args.weights or args.preset}, {args.batch} x {height} x {width}, {args.dtype}, {_name(device)}")
    for part, seconds in times.items():
        low, middle, high = (1000 * value for value in _quantiles(seconds))
        print(f"{part:<10} {middle:9.2f} ms   (20 %: {low:.2f}, 80 %: {high:.2f})")
    print(f"{args.batch / statistics.median(times['whole']):.2f} images/s")
    return 0


def _measure(model: PanopticFPN, images: list[torch.Tensor], runs: int) -> dict[str, list[float]]:
    """Seconds of each run: of the parts, where the device finishes one before the next begins, and of the whole."""
    import torch

    from panfpn_fast.models.panoptic_fpn import merge

    times: dict[str, list[float]] = {}

    def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        if images[0].device.type == "cuda":
            torch.cuda.synchronize(images[0].device)
        times.setdefault(part, []).append(time.perf_counter() - started)
        return result

    def merge_all(found: Any, labels: Any) -> list[Any]:
        return [merge(model.config, *each) for each in zip(found, labels, strict=True)]

    with torch.inference_mode():
        for _ in range(runs + 3):
            batch, sizes = timed("prepare", model.prepare_outputs, images, None)
            features = timed("features", model.features, batch.images)
            found = timed("instances", model.instances, features, batch.sizes, sizes)
            labels = timed("labels", model.labels, features, batch.sizes, sizes)
            timed("merge", merge_all, found, labels)
        for _ in range(runs + 3):
            timed("whole", model, images)
    return {part: seconds[3:] for part, seconds in times.items()}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _name(device: torch.device) -> str:
    """The GPU's name, or how many threads the CPU has to do."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"
