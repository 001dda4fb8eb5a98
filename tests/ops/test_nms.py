from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import nms, reference
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import DEGENERATE_BOXES, any_boxes, generator, random_boxes

NAN = float("nan")


def random_scores(count: int, seed: int) -> Tensor:
    """Returns random scores with ties and, if `count` is large enough, one NaN and one infinite score."""
    scores = torch.randint(0, 50, (count,), generator=generator(seed)) / 50
    scores[2:3] = NAN
    scores[5:6] = float("-inf")
    return scores


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(boxes: Tensor, iou_threshold: float) -> Sample:
        scores = random_scores(len(boxes), seed=len(boxes))
        return Sample((boxes.to(dtype), scores.to(dtype), iou_threshold)).map_tensors(lambda t: t.to(device))

    # The implementations use more than one block above 64 and above 512 boxes. If float32 rounds a threshold down, all
    # devices decide alike.
    return [
        sample(random_boxes(133, (40, 60), 0), 0.45),
        sample(random_boxes(64, (40, 60), 1), 0.45),
        sample(torch.zeros(0, 4), 0.45),
        sample(random_boxes(1, (40, 60), 2), 0.45),
        sample(torch.cat([DEGENERATE_BOXES, DEGENERATE_BOXES, random_boxes(7, (9, 9), 3)]), 0.45),
        sample(random_boxes(1201, (200, 300), 4), 0.7),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["nms"], make_samples(dtype, device))


def keep(
    boxes: list[list[float]], scores: list[float], iou_threshold: float, device: torch.device
) -> list[int]:
    kept = nms(torch.tensor(boxes, device=device), torch.tensor(scores, device=device), iou_threshold)
    assert kept.dtype == torch.int64
    assert kept.device.type == device.type
    return kept.tolist()


def test_drops_above_the_threshold_only(device: torch.device) -> None:
    # The IoU of the first two boxes is 50 / 150, that of the last two 50 / 100.
    boxes = [[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [50.0, 0.0, 60.0, 10.0], [50.0, 0.0, 55.0, 10.0]]
    scores = [0.2, 0.3, 0.8, 0.9]
    assert keep(boxes, scores, 0.3, device) == [3, 1]
    assert keep(boxes, scores, 0.4, device) == [3, 1, 0]
    assert keep(boxes, scores, 0.5, device) == [3, 2, 1, 0]
    assert keep(boxes, scores, -1.0, device) == [3]


def test_a_dropped_box_suppresses_no_box(device: torch.device) -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0], [8.0, 0.0, 18.0, 10.0]]
    assert keep(boxes, [0.9, 0.8, 0.7], 0.3, device) == [0, 2]


@pytest.mark.parametrize(("inter", "threshold"), [(1, 0.1), (3, 0.3), (6, 0.6)])
def test_threshold_is_a_double_on_the_cpu_and_a_float_on_cuda(
    inter: int, threshold: float, device: torch.device
) -> None:
    # The quotient rounded to float32 is above the double threshold and equal to the float32 threshold.
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, float(inter)]]
    assert keep(boxes, [0.9, 0.8], threshold, device) == ([0] if device.type == "cpu" else [0, 1])


@pytest.mark.parametrize(("inter", "threshold"), [(5, 0.5), (7, 0.7)])
def test_equal_to_the_threshold_is_kept(inter: int, threshold: float, device: torch.device) -> None:
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, float(inter)]]
    assert keep(boxes, [0.9, 0.8], threshold, device) == [0, 1]


@pytest.mark.parametrize(
    "box",
    [[3.0, 3.0, 3.0, 9.0], [3.0, 3.0, 3.0, 3.0], [9.0, 9.0, 3.0, 3.0], [NAN, 0.0, 9.0, 9.0]],
    ids=["flat", "point", "inverted", "nan"],
)
def test_duplicates_without_an_iou_are_both_kept(box: list[float], device: torch.device) -> None:
    assert keep([box, box], [0.1, 0.2], 0.5, device) == [1, 0]


def test_order_of_equal_and_nan_scores(device: torch.device) -> None:
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(6)]
    assert keep(boxes, [0.5, NAN, 0.5, 0.9, NAN, 0.5], 0.5, device) == [1, 4, 3, 0, 2, 5]
    many = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(300)]
    assert keep(many, [0.5] * 300, 0.5, device) == list(range(300))


def test_one_of_many_copies_is_kept(device: torch.device) -> None:
    assert keep([[1.0, 2.0, 30.0, 40.0]] * 1000, [0.5] * 1000, 0.5, device) == [0]


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchvision(seed: int, device: torch.device, torchvision_ops: ModuleType) -> None:
    boxes = torch.randint(0, 40, (500, 4), generator=generator(seed)).float().to(device)
    scores = torch.rand(500, generator=generator(seed)).to(device)
    for iou_threshold in (0.1, 0.3, 0.5, 0.7):
        expected = torchvision_ops.nms(boxes, scores, iou_threshold)
        assert torch.equal(nms(boxes, scores, iou_threshold), expected), iou_threshold


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 4, st.integers(0, 3)), max_size=12),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 1.0]),
)
def test_small_integer_boxes(rows: list[tuple[int, ...]], iou_threshold: float) -> None:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    args = (table[:, :4], table[:, 4], iou_threshold)
    assert torch.equal(nms(*args), reference.nms(*args))


@settings(max_examples=100, deadline=None)
@given(
    any_boxes(),
    st.sampled_from([-1.0, -0.0, 1e-30, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0, float("inf")]),
    st.booleans(),
)
def test_equals_the_reference(
    drawn: tuple[Tensor, Tensor], iou_threshold: float, double_precision: bool
) -> None:
    boxes, scores = (part.double() if double_precision else part for part in drawn)
    assert torch.equal(nms(boxes, scores, iou_threshold), reference.nms(boxes, scores, iou_threshold))


@pytest.mark.parametrize("iou_threshold", [0.3, 0.7])
@pytest.mark.parametrize("spread", [3.0, 1000.0], ids=["crowded", "sparse"])
def test_many_boxes_of_all_sizes(iou_threshold: float, spread: float) -> None:
    """Enough boxes for the CPU op to split them by area."""
    random = generator(0)
    count = 1500
    side = torch.exp(torch.rand(count, 2, generator=random) * 9 - 4)
    corner = torch.rand(count, 2, generator=random) * spread
    boxes = torch.cat([corner, corner + side], dim=1)
    scores = torch.rand(count, generator=random)
    assert torch.equal(nms(boxes, scores, iou_threshold), reference.nms(boxes, scores, iou_threshold))


def test_copies_among_very_many_boxes_are_dropped() -> None:
    """Enough boxes for the CPU op to run in parallel; a copy comes directly after its box or much later."""
    count = 10000
    place = torch.arange(count)
    corner = torch.stack([place % 100, place // 100], dim=1) * 10.0
    boxes = torch.cat([corner, corner + 9], dim=1)
    scores = torch.rand(count, generator=generator(0)) + 1
    later = scores - (place % 2)  # a copy has the score of its box, and so follows it, or a much lower score
    kept = nms(torch.cat([boxes, boxes + 0.5]), torch.cat([scores, later]), 0.5)
    assert torch.equal(kept, scores.sort(descending=True, stable=True).indices)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(nms) == inspect.signature(reference.nms)


BOXES = torch.zeros(4, 4)
SCORES = torch.zeros(4)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("boxes", [[0.0, 0.0, 1.0, 1.0]], TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", torch.zeros(4, 5), ValueError),
        ("boxes", torch.zeros(4), ValueError),
        ("scores", [0.5], TypeError),
        ("scores", SCORES.long(), TypeError),
        ("scores", torch.zeros(3), ValueError),
        ("scores", torch.zeros(4, 1), ValueError),
        ("iou_threshold", "0.5", TypeError),
        ("iou_threshold", None, TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"boxes": BOXES, "scores": SCORES, "iou_threshold": 0.5, argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        nms(**arguments)
