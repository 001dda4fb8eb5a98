"""RPN: anchors with known answers, proposals against a one-box-at-a-time oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panfpn_fast.models import PanopticFPNConfig
from panfpn_fast.models.rpn import RPN, cell_anchors, grid_anchors
from support.head_oracles import area, clip, decode, nms


def test_anchors_of_one_position() -> None:
    root = 32 * math.sqrt(2)
    expected = [
        [-root / 2, -root / 4, root / 2, root / 4],
        [-16, -16, 16, 16],
        [-root / 4, -root / 2, root / 4, root / 2],
    ]
    torch.testing.assert_close(torch.tensor(cell_anchors(32, (0.5, 1, 2))), torch.tensor(expected))


def test_anchors_of_a_grid_start_at_the_corner_and_run_along_rows() -> None:
    cell = torch.tensor([[-1.0, -2.0, 1.0, 2.0], [-3.0, -3.0, 3.0, 3.0]])
    anchors = grid_anchors(cell, (2, 3), 8)
    assert anchors.shape == (12, 4)
    assert anchors[0].tolist() == [-1, -2, 1, 2]
    assert anchors[1].tolist() == [-3, -3, 3, 3]
    assert anchors[2].tolist() == [7, -2, 9, 2]
    assert anchors[6].tolist() == [-1, 6, 1, 10]
    assert anchors[11].tolist() == [13, 5, 19, 11]


def test_predictions_are_in_the_order_of_the_anchors() -> None:
    torch.manual_seed(0)
    rpn = RPN(PanopticFPNConfig(fpn_channels=4)).eval()
    features = [torch.randn(2, 4, 5, 7), torch.randn(2, 4, 3, 4)]
    with torch.no_grad():
        logits, deltas = rpn(features)
        hidden = rpn.conv(features[0]).relu()
        objectness, moves = rpn.objectness(hidden), rpn.deltas(hidden)
    assert [list(x.shape) for x in logits] == [[2, 105], [2, 36]]
    assert [list(x.shape) for x in deltas] == [[2, 105, 4], [2, 36, 4]]
    y, x, anchor = 3, 2, 1
    index = (y * 7 + x) * 3 + anchor
    # The network's fused convolutions sum in another order.
    torch.testing.assert_close(logits[0][1, index], objectness[1, anchor, y, x])
    torch.testing.assert_close(deltas[0][1, index], moves[1, anchor * 4 : anchor * 4 + 4, y, x])


def test_anchors_keep_their_precision_in_a_half_precision_network() -> None:
    config = PanopticFPNConfig(fpn_channels=4)
    expected = torch.tensor([cell_anchors(s, config.anchor_ratios) for s in config.anchor_sizes])
    assert torch.equal(RPN(config).to(torch.bfloat16).cells, expected)
    assert torch.equal(RPN(config).half().float().cells, expected)
    assert "cells" not in RPN(config).state_dict()


def _inputs(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rpn = RPN(PanopticFPNConfig(fpn_channels=4, anchor_sizes=(16, 24, 32, 48, 64)))
    features = [torch.empty(2, 4, side, side + 1, dtype=torch.float64) for side in (8, 4, 2, 1, 1)]
    anchors = rpn.double().anchors(features)
    logits = [torch.randn(2, len(a), generator=generator, dtype=torch.float64) for a in anchors]
    deltas = [torch.randn(2, len(a), 4, generator=generator, dtype=torch.float64) for a in anchors]
    return anchors, logits, deltas


@pytest.mark.parametrize("seed", range(4))
def test_proposals_equal_the_oracle(seed: int) -> None:
    anchors, logits, deltas = _inputs(seed)
    deltas[0][0, 3] = torch.tensor([0.0, 0, 9, 9])  # above the limit
    deltas[0][0, 4, 2] = float("nan")
    deltas[1][1, 5, 0] = float("inf")
    deltas[1][1, 6] = torch.tensor([100.0, 0, 0, 0])  # right of the image
    logits[2][0, 1] = float("inf")
    rpn = RPN(PanopticFPNConfig(fpn_channels=4, rpn_pre_nms_topk=20, rpn_post_nms_topk=22))
    sizes = [(29, 31), (32, 20)]
    proposals = rpn.propose(anchors, logits, deltas, sizes)
    for image, (height, width) in enumerate(sizes):
        candidates = []
        for level in range(5):
            order = logits[level][image].argsort(descending=True)[:20]
            for i in order.tolist():
                score, delta = logits[level][image, i].item(), deltas[level][image, i].tolist()
                if not all(map(math.isfinite, [score, *delta])):
                    continue
                box = clip(decode(anchors[level][i].tolist(), delta, (1, 1, 1, 1)), height, width)
                if area(box) > 0:
                    candidates.append((score, box, level))
        expected = [box for _, box, _ in nms(candidates, 0.7)][:22]
        assert len(expected) > 15
        torch.testing.assert_close(proposals[image], torch.tensor(expected, dtype=torch.float64))


def test_no_valid_box_gives_no_proposals() -> None:
    anchors, logits, deltas = _inputs(0)
    nothing = [torch.full_like(d, float("nan")) for d in deltas]
    rpn = RPN(PanopticFPNConfig(fpn_channels=4))
    assert [list(p.shape) for p in rpn.propose(anchors, logits, nothing, [(32, 32)] * 2)] == [[0, 4]] * 2


def test_ranking_by_probability() -> None:
    """An infinite logit is dropped, but its probability of 1 is not; the order of the others is equal."""
    anchors, logits, deltas = _inputs(1)
    by_logit, by_probability = (
        RPN(PanopticFPNConfig(fpn_channels=4, rpn_ranking=ranking)) for ranking in ("logit", "probability")
    )
    sizes = [(32, 32)] * 2
    expected = by_logit.propose(anchors, logits, deltas, sizes)
    for got, wanted in zip(by_probability.propose(anchors, logits, deltas, sizes), expected, strict=True):
        assert torch.equal(got, wanted)
    infinite = [torch.full_like(logit, float("inf")) for logit in logits]
    assert len(by_logit.propose(anchors, infinite, deltas, sizes)[0]) == 0
    assert len(by_probability.propose(anchors, infinite, deltas, sizes)[0]) > 10
