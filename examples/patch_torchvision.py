"""Compares torchvision's Mask R-CNN with and without panfpn_fast ops: equal detections, in less time.

pip install torchvision
python examples/patch_torchvision.py                                    # random weights, random pixels
python examples/patch_torchvision.py --image photo.jpg --weights DEFAULT  # downloads torchvision's weights
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

import panfpn_fast

Detections = dict[str, Tensor]


def seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Returns the median time of `repeats` calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> tuple[Detections, Detections]:
    """Returns the detections without and with the patch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="path of an image; random pixels by default")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), help="height and width of the random pixels"
    )
    parser.add_argument(
        "--weights", help="name of torchvision's weights: DEFAULT or COCO_V1; random by default"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = torchvision.models.get_model(
        "maskrcnn_resnet50_fpn_v2",
        weights=args.weights,
        weights_backbone=None,
        # With random weights, all scores are low.
        box_score_thresh=0.5 if args.weights else 0.0,
        min_size=min(args.size),
    )
    model.eval().to(args.device)
    if args.image:
        pixels = torch.from_numpy(np.asarray(Image.open(args.image).convert("RGB")).copy())
        image = pixels.permute(2, 0, 1).float().to(args.device) / 255
    else:
        image = torch.rand(3, *args.size, device=args.device)

    with torch.inference_mode():
        [before] = model([image])
        slow = seconds(lambda: model([image]), args.repeats, args.device)
        # In your own program, call panfpn_fast.patch("torchvision") once at the start.
        with panfpn_fast.patch("torchvision") as patch:
            print(patch)
            [after] = model([image])
            fast = seconds(lambda: model([image]), args.repeats, args.device)

    assert torch.equal(before["labels"], after["labels"])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-3)
    print(
        f"equal results for {len(after['labels'])} detections: {1e3 * slow:.0f} ms before, {1e3 * fast:.0f} ms patched"
    )
    return before, after


if __name__ == "__main__":
    main()
