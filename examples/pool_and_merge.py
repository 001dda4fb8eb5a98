"""Computes a panoptic map without a network, with `multiscale_roi_align` and `panoptic_merge`.

    python examples/pool_and_merge.py --out pool_and_merge.png

The inputs are a scene, a box around each object, a click on each object, and a label map of the stuff. Pixels in a box
that have the colour of the clicked pixel belong to the object. The first op crops all boxes from an image pyramid, each
from the level that suits its size. The second op merges the overlapping masks into one map. The script prints the
segments and saves an image that shows the scene and the map.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from panfpn_fast import ops
from panfpn_fast.data.sample import make_target
from panfpn_fast.data.synthetic import SYNTHETIC, SyntheticDataset

SIDE = 28


def masks_by_colour(image: Tensor, boxes: Tensor, colours: Tensor) -> Tensor:
    """Computes the probability that a pixel belongs to the object in its box, from the distance to the object's colour.

    Args:
        image: [3, H, W], values in 0..1.
        boxes: [N, 4], boxes around the objects, in pixels.
        colours: [N, 3], colours of the objects.

    Returns:
        [N, 28, 28], a mask of probabilities for each box.
    """
    pyramid = [image[None]]
    while len(pyramid) < 4:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    scales = [1.0, 1 / 2, 1 / 4, 1 / 8]
    # A box with sides of 28 pixels is cropped from the image itself, one with sides of 56 pixels from the next level.
    crops = ops.multiscale_roi_align(
        pyramid, [boxes], SIDE, scales, canonical_box_size=SIDE, canonical_level=0
    )  # [N, 3, 28, 28]
    distance = (crops - colours[:, :, None, None]).norm(dim=1)
    return torch.sigmoid(40 * (0.15 - distance))


def main() -> ops.PanopticSegments:
    """Prints the segments and returns their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=5, help="number of the random scene")
    parser.add_argument("--out", default="pool_and_merge.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    scene = SyntheticDataset(1, seed=args.seed, size=(256, 384)).load(0)
    target = make_target(scene)
    image, boxes = scene.image.to(args.device).float() / 255, target.boxes.to(args.device)
    clicks = [(target.instances == number + 1).nonzero() for number in range(len(boxes))]
    colours = torch.stack([image[:, y, x] for y, x in (found[len(found) // 2].tolist() for found in clicks)])
    # Later shapes cover earlier ones, so they get higher scores.
    scores = torch.linspace(0.6, 0.9, len(boxes), device=args.device)

    panoptic, segments = ops.panoptic_merge(
        masks_by_colour(image, boxes, colours),
        boxes,
        scores,
        target.classes.to(args.device),
        target.semantic.to(args.device),
        scene.size,
        stuff_area_threshold=64,
    )

    names = {True: [c.name for c in SYNTHETIC.things], False: ["other", *(c.name for c in SYNTHETIC.stuff)]}
    for number, isthing, label, score, area in zip(
        *(column.tolist() for column in segments[:5]), strict=True
    ):
        kind = f"thing, score {score:.2f}" if isthing else "stuff"
        print(f"{number:3}  {names[isthing][label]:10} {area:6} pixels, {kind}")
    right = (panoptic > 0).float().mean().item()
    print(f"{right:.1%} of the pixels have a segment")

    palette = np.random.default_rng(0).integers(64, 256, (len(segments.id) + 1, 3)).astype(np.uint8)
    palette[0] = 0
    images = [scene.image.permute(1, 2, 0).numpy(), palette[panoptic.cpu().numpy()]]
    Image.fromarray(np.concatenate(images, axis=1)).save(args.out)
    return segments


if __name__ == "__main__":
    main()
