"""batched_nms on the box head's candidates in 80 classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from panfpn_fast.ops import batched_nms, reference

from ..harness import inputs, peers
from ..harness.agreement import same_kept
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from .test_nms import PAIR_FLOPS, few_boxes

# torchvision may shift the coordinates of each group apart instead of comparing groups. The shift rounds coordinates
# (see `ops.batched_nms`), so for a thousand boxes of 80 classes the results differ in a few boxes.
_SHIFTED_SHARE = 5e-3


def _arguments(count: int) -> Arguments:
    boxes, scores = inputs.proposals(count)
    return boxes, scores, inputs.groups(count), 0.5


def _cost(arguments: Arguments, kept: Tensor) -> Cost:
    sizes = torch.bincount(arguments[2])
    pairs = int((sizes * (sizes - 1)).sum()) // 2
    return Cost(bytes=nbytes(arguments) + nbytes(kept), flops=PAIR_FLOPS * pairs)


COMPARISON = Comparison(
    op="batched_nms",
    ours=batched_nms,
    peers=[
        Peer(
            "torchvision",
            lambda *args: peers.torchvision_ops().batched_nms(*args),
            peers.torchvision_problem,
            agree=same_kept(_SHIFTED_SHARE),
        ),
        Peer("reference", reference.batched_nms, sample=few_boxes),
    ],
    cases=[
        Case("1000 x 80 classes", partial(_arguments, 1000)),
        Case("4000 x 80 classes", partial(_arguments, 4000), highlight=True),
        Case("20000 x 80 classes", partial(_arguments, 20000), full=True),
    ],
    agree=same_kept(),
    cost=_cost,
)


@COMPARISON.rows()
def test_batched_nms(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
