"""`panfpn-fast bench`. torch is imported only when the command runs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from panfpn_fast._errors import UserError, one_line
from panfpn_fast.cli._common import (
    add_device,
    add_dtype,
    name_or_path,
    pixels,
    positive,
    reporting_user_errors,
)
from panfpn_fast.cli._network import usual_size

if TYPE_CHECKING:
    import torch

    from panfpn_fast.models import PanopticFPN

_DESCRIPTION = """\
Times a network's prediction on images of noise. Prints milliseconds (median, 20 % and 80 % quantiles) of the whole
and of its parts, and images per second. The images are on the device; reading and resizing are not included.
"""


def add_bench(commands: Any) -> None:
    """Adds the command to the command line."""
    bench = commands.add_parser("bench", help="time a network's prediction", description=_DESCRIPTION)
    network = bench.add_mutually_exclusive_group()
    network.add_argument(
        "--weights",
        type=name_or_path,
        metavar="NAME_OR_PATH",
        help="checkpoint file, or the name of a published checkpoint",
    )
    network.add_argument(
        "--preset",
        default="panoptic_fpn_r50",
        metavar="NAME",
        help="network with random weights, which detects less than a trained one (default: %(default)s)",
    )
    bench.add_argument(
        "--size",
        type=pixels,
        nargs=2,
        metavar=("H", "W"),
        help="default: a 2:3 image resized with the network's edges, such as 800 1200",
    )
    bench.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="images per call (default: %(default)s)"
    )
    bench.add_argument(
        "--runs",
        type=positive,
        default=20,
        metavar="N",
        help="timed runs, after 3 warm-up runs (default: %(default)s)",
    )
    add_device(bench)
    add_dtype(bench)
    bench.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    import torch

    import panfpn_fast
    from panfpn_fast._device import resolve_device
    from panfpn_fast.models.conv_fusion import fold_norms, prepare_convolutions

    try:
        device = resolve_device(args.device)
        if args.weights is None:
            torch.manual_seed(0)
            model = panfpn_fast.PanopticFPN.from_config(args.preset).eval()
        else:
            model = panfpn_fast.load(args.weights)
    except (OSError, ValueError, ImportError) as error:  # the messages name the file or what is missing
        raise UserError(one_line(error)) from error
    height, width = args.size or usual_size(model.config)
    with reporting_user_errors("Try a smaller --size or --batch"):
        # As in Predictor.
        folded = fold_norms(model)
        folded.to(device, getattr(torch, args.dtype), memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = prepare_convolutions(folded)
        images = torch.randint(0, 256, (args.batch, 3, height, width), dtype=torch.uint8, device="cpu")
        times = _measure(model, list(images.to(device)), args.runs)
    print(f"{args.weights or args.preset}, {args.batch} x {height} x {width}, {args.dtype}, {_name(device)}")
    for part, seconds in times.items():
        low, middle, high = (1000 * value for value in _quantiles(seconds))
        print(f"{part:<10} {middle:9.2f} ms   (20 %: {low:.2f}, 80 %: {high:.2f})")
    print(f"{args.batch / statistics.median(times['whole']):.2f} images/s")
    return 0


def _measure(model: PanopticFPN, images: list[torch.Tensor], runs: int) -> dict[str, list[float]]:
    """Returns seconds of each run, of the whole and of its parts; each part ends before the next starts."""
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
    """Returns the 20 % quantile, the median and the 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _name(device: torch.device) -> str:
    """Returns the GPU's name, or the number of CPU threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"
