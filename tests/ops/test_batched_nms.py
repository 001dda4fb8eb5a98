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

from panfpn_fast.ops import batched_nms, nms, reference
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import DEGENERATE_BOXES, any_boxes, generator, random_boxes


def random_groups(count: int, groups: int, seed: int) -> Tensor:
    return torch.randint(0, groups, (count,), generator=generator(seed))


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(boxes: Tensor, idxs: Tensor, **kwargs: Any) -> Sample:
        scores = torch.randint(0, 50, (len(boxes),), generator=generator(len(boxes))) / 50
        args = (boxes.to(dtype), scores.to(dtype), idxs, 0.45)
        return Sample(args, kwargs).map_tensors(lambda tensor: tensor.to(device))

    boxes = random_boxes(133, (40, 60), 0)
    groups = random_groups(133, 5, 0)
    degenerate = torch.cat([DEGENERATE_BOXES, DEGENERATE_BOXES])
    return [
        sample(boxes, groups),
        sample(boxes[:70], groups[:70] * (2**40) - 7),
        sample(boxes[:0], groups[:0]),
        sample(boxes[:1], groups[:1]),
        sample(boxes[:77], groups[:77].int()),
        sample(boxes[:77], groups[:77].to(torch.uint8)),
        sample(degenerate, random_groups(len(degenerate), 2, 1)),
        sample(random_boxes(1201, (200, 300), 4), torch.zeros(1201, dtype=torch.int64)),
        sample(boxes[:0], groups[:0], exact="torchvision"),
        sample(degenerate, random_groups(len(degenerate), 2, 1), exact="torchvision"),
        sample(boxes, groups, exact="torchvision"),
        sample(boxes[:70], groups[:70], exact="torchvision"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["batched_nms"], make_samples(dtype, device))


def test_groups_do_not_affect_each_other(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 4, device=device)
    scores = torch.tensor([0.1, 0.9, 0.8, 0.9], device=device)
    idxs = torch.tensor([3, 3, -1, 7], device=device)
    for exact in ("class", "torchvision"):
        assert batched_nms(boxes, scores, idxs, 0.5, exact).tolist() == [1, 3, 2]
    assert batched_nms(boxes, scores, torch.zeros_like(idxs), 0.5).tolist() == [1]


def test_negative_coordinates_collide_only_under_torchvisions_offsets(device: torch.device) -> None:
    # The largest coordinate is 9, so the second group is moved by 10, which puts its box onto that of the first group.
    boxes = torch.tensor([[5.0, 5.0, 9.0, 9.0], [-5.0, -5.0, -1.0, -1.0]], device=device)
    args = (boxes, torch.tensor([0.9, 0.8], device=device), torch.tensor([0, 1], device=device), 0.5)
    assert batched_nms(*args).tolist() == [0, 1]
    assert batched_nms(*args, exact="torchvision").tolist() == [0]


def test_equals_nms_of_each_group(device: torch.device) -> None:
    boxes = random_boxes(400, (60, 60), 0).to(device)
    scores = torch.rand(400, generator=generator(0)).to(device)
    idxs = random_groups(400, 9, 0).to(device)
    kept = []
    for group in range(9):
        members = torch.nonzero(idxs == group)[:, 0]
        kept.append(members[nms(boxes[members], scores[members], 0.3)])
    together = torch.cat(kept)
    assert torch.equal(
        batched_nms(boxes, scores, idxs, 0.3), together[scores[together].argsort(descending=True)]
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchvision(seed: int, device: torch.device, torchvision_ops: ModuleType) -> None:
    # Up to 1,000 boxes, torchvision uses the offsets on every device.
    boxes = random_boxes(900, (300, 400), seed).to(device)
    scores = torch.rand(900, generator=generator(seed)).to(device)
    idxs = random_groups(900, 80, seed).to(device)
    expected = torchvision_ops.batched_nms(boxes, scores, idxs, 0.5)
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5, exact="torchvision"), expected)


@settings(max_examples=60, deadline=None)
@given(
    any_boxes(),
    st.sampled_from([1, 4, 90]),
    st.sampled_from([1, -(2**55)]),
    st.sampled_from([-0.5, 0.0, 0.3, 0.6]),
)
def test_equals_the_reference(
    drawn: tuple[Tensor, Tensor], groups: int, scale: int, iou_threshold: float
) -> None:
    boxes, scores = drawn
    args = (boxes, scores, random_groups(len(boxes), groups, 0) * scale, iou_threshold)
    assert torch.equal(batched_nms(*args), reference.batched_nms(*args))


def test_reference_has_the_same_parameters() -> None:
    names = list(inspect.signature(batched_nms).parameters)
    assert names == list(inspect.signature(reference.batched_nms).parameters)


BOXES = torch.zeros(4, 4)
SCORES = torch.zeros(4)
IDXS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("boxes", None, TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", torch.zeros(4, 5), ValueError),
        ("scores", SCORES.long(), TypeError),
        ("scores", torch.zeros(3), ValueError),
        ("idxs", [0, 0, 0, 0], TypeError),
        ("idxs", IDXS.float(), TypeError),
        ("idxs", IDXS.bool(), TypeError),
        ("idxs", IDXS[:3], ValueError),
        ("idxs", IDXS[:, None], ValueError),
        ("iou_threshold", "0.5", TypeError),
        ("exact", "classes", ValueError),
        ("exact", None, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "boxes": BOXES,
        "scores": SCORES,
        "idxs": IDXS,
        "iou_threshold": 0.5,
        argument: value,
    }
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        batched_nms(**arguments)
