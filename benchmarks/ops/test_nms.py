"""nms on the region proposals of one level, of one image before top-k, and on 10,000 boxes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from panfpn_fast.ops import nms, reference

from ..harness import inputs, peers
from ..harness.agreement import same_kept
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes

# Four minima and maxima, two differences, two clamps, a product, a sum, a difference, a quotient and a comparison.
PAIR_FLOPS = 13


def _arguments(count: int) -> Arguments:
    return (*inputs.proposals(count), 0.7)


def few_boxes(arguments: Arguments) -> Arguments:
    """Reduces each per-box argument to the first thousand boxes."""
    return tuple(value[:1000] if isinstance(value, Tensor) else value for value in arguments)


def _cost(arguments: Arguments, kept: Tensor) -> Cost:
    count = len(arguments[0])
    return Cost(bytes=nbytes(arguments) + nbytes(kept), flops=PAIR_FLOPS * count * (count - 1) // 2)


COMPARISON = Comparison(
    op="nms",
    ours=nms,
    peers=[
        Peer("torchvision", lambda *args: peers.torchvision_ops().nms(*args), peers.torchvision_problem),
        Peer("reference", reference.nms, sample=few_boxes),
    ],
    cases=[
        Case(f"{count} boxes", partial(_arguments, count), highlight=count == 4000)
        for count in (1000, 4000, 10000)
    ],
    agree=same_kept(),
    cost=_cost,
)


@COMPARISON.rows()
def test_nms(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
