"""panoptic_merge of detections and semantic labels, compared with pasting masks and then merging them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from panfpn_fast.ops import PanopticSegments, panoptic_merge, panoptic_merge_padded

from ..harness import inputs, peers
from ..harness.agreement import same_panoptic
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .test_paste_masks import PIXEL_FLOPS, box_pixels


def _arguments(count: int, size: tuple[int, int]) -> Arguments:
    return (*inputs.detections(count, size), inputs.semantic_labels(size), size)


def _cost(arguments: Arguments, output: Any) -> Cost:
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=PIXEL_FLOPS * box_pixels(arguments[1]))


def _padded(*arguments: Any) -> Any:
    return panoptic_merge_padded(*arguments, max_segments=200)


def _same_padded(ours: Any, theirs: Any) -> None:
    panoptic, segments, count = ours
    rows = PanopticSegments(*(column[: int(count)] for column in segments))
    same_panoptic((panoptic, rows), theirs)


COMPARISON = Comparison(
    op="panoptic_merge",
    ours=panoptic_merge,
    peers=[Peer("detectron2", peers.detectron2_merge)],
    cases=[
        Case("100 in 800 x 1333", partial(_arguments, 100, inputs.IMAGE), highlight=True),
        Case("300 in 2048 x 4096", partial(_arguments, 300, inputs.LARGE), full=True),
    ],
    agree=same_panoptic,
    cost=_cost,
)

# The same work with the table of fixed size that a CUDA graph needs, without a host read on a GPU.
PADDED = Comparison(
    op="panoptic_merge_padded",
    ours=_padded,
    peers=[Peer("detectron2", peers.detectron2_merge)],
    cases=[Case("100 in 800 x 1333", partial(_arguments, 100, inputs.IMAGE))],
    agree=_same_padded,
    cost=_cost,
)


@COMPARISON.rows()
def test_panoptic_merge(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@PADDED.rows()
def test_panoptic_merge_padded(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
