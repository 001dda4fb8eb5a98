"""Divides the batch of a step into parts whose gradients are accumulated."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast.data.loader import Batch
from panfpn_fast.data.sample import IGNORE
from panfpn_fast.distributed import mean_count


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """Divides a batch into a number of parts of equal length, in order.

    Args:
        batch: The batch; the number of its images is a multiple of `count`.
        count: Number of parts.
    """
    length = len(batch.images) // count
    parts = [slice(begin, begin + length) for begin in range(0, length * count, length)]
    return [Batch(batch.images[part], batch.targets[part], batch.seeds[part]) for part in parts]


def labelled_pixels(parts: list[Batch], device: torch.device) -> Tensor | None:
    """Returns the mean number of pixels, over all parts and processes, that are not void.

    The semantic loss of each part is divided by it, so that every pixel of a step has the same weight. With one part,
    None lets the loss count its pixels.
    """
    if len(parts) == 1:
        return None
    pixels = sum(int((target.semantic != IGNORE).sum()) for part in parts for target in part.targets)
    return mean_count(torch.tensor(pixels, device=device)) / len(parts)
