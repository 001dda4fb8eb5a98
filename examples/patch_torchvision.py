"""A Mask R-CNN of torchvision's with and without our ops: the same detections, in less time.

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
    """The median of a few calls."""
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
    parser.add_argument("--image", help="a photograph; random pixels otherwise")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="of the random pixels")
    parser.add_argument("--weights", help="as torchvision names them: DEFAULT or COCO_V1; random otherwise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = torchvision.models.get_model(
        "maskrcnn_resnet50_fpn_v2",
        weights=args.weights,
        weights_backbone=None,
        # Random weights are sure of nothing.
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
        # In a program of your own, panfpn_fast.patch("torchvision") in one line at its beginning.
        with panfpn_fast.patch("torchvision") as patch:
            print(patch)
            [after] = model([image])
            fast = seconds(lambda: model([image]), args.repeats, args.device)

    assert torch.equal(before["labels"], after["labels"])
    for name in ("boxes", "scores", "masks"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-3)
    print(
        f"the same {len(after['labels'])} detections: {1e3 * slow:.0f} ms before, {1e3 * fast:.0f} ms patched"
    )
    return before, after


if __name__ == "__main__":
    main()
