"""`multiscale_roi_align` and `panoptic_merge` on their own: a panoptic map without any network.

    python examples/pool_and_merge.py --out pool_and_merge.png

Given a box around each object of a scene and a click on it, what has the colour of that pixel is taken for the object;
the stuff behind is given. The first op cuts all boxes out of an image pyramid, each from the level that suits its size;
the second makes one map of masks that overlap. Prints the segments; the picture shows the scene and the map.
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
    """How likely pixels belong to an object of a colour.

    Args:
        image: [3, H, W], values in 0..1.
        boxes: [N, 4], around the objects.
        colours: [N, 3], theirs.

    Returns:
        [N, 28, 28], a mask inside each box.
    """
    pyramid = [image[None]]
    while len(pyramid) < 4:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    scales = [1.0, 1 / 2, 1 / 4, 1 / 8]
    # A box of 28 pixels comes from the image itself, one of twice the side from the level above, and so on.
    crops = ops.multiscale_roi_align(
        pyramid, [boxes], SIDE, scales, canonical_box_size=SIDE, canonical_level=0
    )  # [N, 3, 28, 28]
    distance = (crops - colours[:, :, None, None]).norm(dim=1)
    return torch.sigmoid(40 * (0.15 - distance))


def main() -> ops.PanopticSegments:
    """Returns the table of segments that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=5, help="which scene")
    parser.add_argument("--out", default="pool_and_merge.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    scene = SyntheticDataset(1, seed=args.seed, size=(256, 384)).load(0)
    target = make_target(scene)
    image, boxes = scene.image.to(args.device).float() / 255, target.boxes.to(args.device)
    clicks = [(target.instances == number + 1).nonzero() for number in range(len(boxes))]
    colours = torch.stack([image[:, y, x] for y, x in (found[len(found) // 2].tolist() for found in clicks)])
    # Later shapes cover earlier ones, so they come first.
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
    pictures = [scene.image.permute(1, 2, 0).numpy(), palette[panoptic.cpu().numpy()]]
    Image.fromarray(np.concatenate(pictures, axis=1)).save(args.out)
    return segments


if __name__ == "__main__":
    main()
