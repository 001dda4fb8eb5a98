"""A training loop for semantic segmentation that never computes logits at the size of the image.

    python examples/train_semantic_segmentation.py --steps 60

The network has three convolutions and predicts at a quarter of the resolution; any other network works too. Two lines
differ from the usual loop. Each has a comment that shows the usual code.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.data.sample import IGNORE, semantic_map
from panfpn_fast.data.synthetic import SYNTHETIC, SyntheticDataset

STRIDE = 4


def make_network(classes: int) -> nn.Module:
    """Creates a network that predicts logits [N, classes, H / 4, W / 4] from images [N, 3, H, W]."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=2, padding=3),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, classes, 3, padding=1),
    )


def batch(scenes: SyntheticDataset, numbers: range) -> tuple[Tensor, Tensor]:
    """Returns images [N, 3, H, W] in 0..1 and labels int16 [N, H, W]: 0 = thing, 1.. = stuff, -1 = not annotated."""
    samples = [scenes.load(number) for number in numbers]
    images = torch.stack([sample.image for sample in samples]).float() / 255
    return images, torch.stack([semantic_map(sample) for sample in samples])


def main() -> float:
    """Trains, prints the loss, and returns the share of correctly labelled pixels in unseen scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    network = make_network(1 + len(SYNTHETIC.stuff)).to(args.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    scenes = SyntheticDataset(args.steps * args.batch, seed=0)
    for step in range(args.steps):
        images, labels = (
            x.to(args.device) for x in batch(scenes, range(step * args.batch, (step + 1) * args.batch))
        )
        logits = network(images)
        # Replaces F.cross_entropy(F.interpolate(logits, scale_factor=4, mode="bilinear"), labels.long(), ...)
        loss = ops.upsample_cross_entropy(logits, labels, STRIDE, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    network.eval()
    images, labels = (x.to(args.device) for x in batch(SyntheticDataset(16, seed=1), range(16)))
    with torch.no_grad():
        # Replaces F.interpolate(network(images), scale_factor=4, mode="bilinear").argmax(1)
        found = ops.upsample_argmax(network(images), STRIDE)
    annotated = labels != IGNORE
    right = (found[annotated] == labels[annotated]).float().mean().item()
    print(f"{right:.1%} of the pixels of 16 unseen scenes are correct")
    return right


if __name__ == "__main__":
    main()
