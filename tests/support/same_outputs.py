"""Compares predictions of a network with static shapes and of the eager network."""

from __future__ import annotations

import torch
from torch import Tensor

from panfpn_fast.models import PanopticOutput


def assert_same(found: PanopticOutput, expected: PanopticOutput) -> None:
    """Requires equal integers, and equal boxes and probabilities up to rounding.

    Boxes and probabilities come from matrix products with more rows, whose sums may have a different order. The error
    is a few units in the last place of numbers up to 100, times a factor of up to 10 from there to the output.
    """
    pairs = list(zip(found._replace(segments=None), expected._replace(segments=None), strict=True))  # type: ignore[arg-type]
    pairs += zip(found.segments, expected.segments, strict=True)
    for one, other in pairs:
        if isinstance(one, Tensor):
            tolerance = 1e-4 if one.is_floating_point() else 0
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0)
