"""paste_masks on the masks of all detections, at the size of the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from panfpn_fast.ops import paste_masks

from ..harness import inputs, peers
from ..harness.agreement import same_pixels
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes

# A bilinear sample of four values, with weights shared between rows and columns, and the comparison.
PIXEL_FLOPS = 8

# torchvision truncates boxes to whole pixels and resizes masks to them, so boundaries differ. This coarse bound only
# checks that both do the same work.
_OTHER_GEOMETRY_SHARE = 0.1

# Interpolated values extend half a mask pixel beyond the box. detectron2 cuts them off on the CPU, but not on the GPU;
# ours never cuts them off.
_CUT_SHARE = 0.05


def box_pixels(boxes: Tensor) -> int:
    """Returns the sum of the areas of boxes in pixels."""
    extent = (boxes[:, 2:] - boxes[:, :2]).double().clamp(min=0)
    return int((extent[:, 0] * extent[:, 1]).sum())


def _arguments(count: int, size: tuple[int, int], threshold: float) -> Arguments:
    found = inputs.detections(count, size)
    return found.masks, found.boxes, size, threshold


def _cost(arguments: Arguments, pasted: Tensor) -> Cost:
    return Cost(bytes=nbytes(arguments) + nbytes(pasted), flops=PIXEL_FLOPS * box_pixels(arguments[1]))


DETECTRON2 = Peer("detectron2", peers.detectron2_paste)

COMPARISON = Comparison(
    op="paste_masks",
    ours=paste_masks,
    peers=[
        DETECTRON2,
        Peer(
            "torchvision",
            peers.torchvision_paste,
            peers.torchvision_problem,
            agree=same_pixels(_OTHER_GEOMETRY_SHARE),
        ),
        Peer("torch.compile", peers.compiled(peers.dense_paste), peers.compile_problem, full=True),
    ],
    cases=[Case("100 into 800 x 1333", partial(_arguments, 100, inputs.IMAGE, 0.5), highlight=True)],
    agree=same_pixels(),
    cost=_cost,
)

# The other peers need ten gigabytes or more for this case.
LARGE = Comparison(
    op="paste_masks",
    ours=paste_masks,
    peers=[DETECTRON2],
    cases=[Case("300 into 2048 x 4096", partial(_arguments, 300, inputs.LARGE, 0.5), full=True)],
    agree=same_pixels(),
    cost=_cost,
)

VALUES = Comparison(
    op="paste_masks, uint8",
    ours=paste_masks,
    peers=[
        Peer("detectron2", peers.detectron2_paste, agree=same_pixels(_CUT_SHARE)),
        Peer("grid_sample of all", peers.dense_paste),
    ],
    cases=[Case("100 into 800 x 1333", partial(_arguments, 100, inputs.IMAGE, -1.0), full=True)],
    agree=same_pixels(),
    cost=_cost,
)


@COMPARISON.rows()
def test_paste_masks(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@LARGE.rows()
def test_paste_masks_large(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@VALUES.rows()
def test_paste_masks_values(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
