"""nms_padded on the proposals of one image, at most 1000 kept, compared with `nms` and truncation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from panfpn_fast.ops import nms_padded

from ..harness import inputs, peers
from ..harness.agreement import same_kept
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .test_nms import PAIR_FLOPS

_LIMIT = 1000


def _arguments(count: int) -> Arguments:
    boxes, scores = inputs.proposals(count)
    return boxes, scores, None, 0.7, _LIMIT


def _torchvision(boxes: Tensor, scores: Tensor, idxs: None, iou_threshold: float, limit: int) -> Tensor:
    kept: Tensor = peers.torchvision_ops().nms(boxes, scores, iou_threshold)
    return kept[:limit]


def _reference(*arguments: object) -> Tensor:
    from panfpn_fast.ops import reference

    keep, count = reference.nms_padded(*arguments)  # type: ignore[arg-type]
    return keep[: int(count)]


def _same_kept(ours: tuple[Tensor, Tensor], theirs: Tensor) -> None:
    keep, count = ours
    assert torch.equal(keep[int(count) :], torch.full_like(keep[int(count) :], -1)), (
        "the rest of `keep` is not filled with -1"
    )
    same_kept()(keep[: int(count)], theirs)


def _cost(arguments: Arguments, output: tuple[Tensor, Tensor]) -> Cost:
    count = len(arguments[0])
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=PAIR_FLOPS * count * (count - 1) // 2)


COMPARISON = Comparison(
    op="nms_padded",
    ours=nms_padded,
    peers=[
        Peer("torchvision", _torchvision, peers.torchvision_problem),
        Peer(
            "reference",
            _reference,
            sample=lambda arguments: (*(v[:1000] for v in arguments[:2]), *arguments[2:]),
        ),
    ],
    cases=[Case(f"{count} boxes", partial(_arguments, count)) for count in (1000, 4000)],
    agree=_same_kept,
    cost=_cost,
)


@COMPARISON.rows()
def test_nms_padded(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
