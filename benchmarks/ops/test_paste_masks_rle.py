"""paste_masks_rle on the masks of all detections, compared with pasting and then encoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from panfpn_fast.ops import paste_masks_rle

from ..harness import inputs, peers
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .test_paste_masks import PIXEL_FLOPS, box_pixels


def _arguments(count: int, size: tuple[int, int]) -> Arguments:
    found = inputs.detections(count, size)
    return found.masks, found.boxes, size


def _nearly_same_bytes(ours: Any, theirs: Any) -> None:
    """Allows a few masks to differ, since one pixel that crosses the threshold changes the bytes of its mask."""
    other = sum(mine["counts"] != peer["counts"] for mine, peer in zip(ours, theirs, strict=True))
    assert other <= 0.05 * len(ours), f"{other} of {len(ours)} masks have different runs"


COMPARISON = Comparison(
    op="paste_masks_rle",
    ours=paste_masks_rle,
    peers=[
        Peer("detectron2 and pycocotools", peers.paste_then_encode, peers.pycocotools_problem),
    ],
    cases=[
        Case("100 into 800 x 1333", partial(_arguments, 100, inputs.IMAGE), highlight=True),
        Case("300 into 2048 x 4096", partial(_arguments, 300, inputs.LARGE), full=True),
    ],
    agree=_nearly_same_bytes,
    cost=lambda arguments, output: Cost(nbytes(arguments), PIXEL_FLOPS * box_pixels(arguments[1])),
)


@COMPARISON.rows()
def test_paste_masks_rle(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
