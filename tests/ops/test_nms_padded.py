from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import batched_nms, nms, nms_padded, reference
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import DEGENERATE_BOXES, any_boxes, generator, random_boxes

NAN = float("nan")


def random_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Returns random scores with ties and, if there are enough, some NaN."""
    scores = torch.randint(0, 50, shape, generator=generator(seed)) / 50
    scores[..., 2:3] = NAN
    return scores


def random_groups(shape: tuple[int, ...], groups: int, seed: int) -> Tensor:
    return torch.randint(0, groups, shape, generator=generator(seed))


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(boxes: Tensor, groups: int | None, max_output: int, scale: int = 1) -> Sample:
        shape = tuple(boxes.shape[:-1])
        idxs = None if groups is None else random_groups(shape, groups, 0) * scale - 7
        scores = random_scores(shape, seed=boxes.numel())
        args = (boxes.to(dtype), scores.to(dtype), idxs, 0.45, max_output)
        return Sample(args).map_tensors(lambda tensor: tensor.to(device))

    boxes = random_boxes(133, (40, 60), 0)
    batch = torch.stack([random_boxes(129, (40, 60), seed) for seed in range(3)])
    degenerate = torch.cat([DEGENERATE_BOXES, DEGENERATE_BOXES, random_boxes(7, (9, 9), 3)])
    # A tile on the GPU has 64 boxes. The number of kept boxes is both above and below `max_output`.
    return [
        sample(boxes, None, 150),
        sample(boxes, None, 11),
        sample(boxes[:64], None, 0),
        sample(boxes[:0], None, 5),
        sample(boxes[:1], None, 3),
        sample(degenerate, None, 31),
        sample(boxes, 5, 101),
        sample(boxes[:65], 3, 9, scale=2**40),
        sample(boxes[:0], 5, 7),
        sample(random_boxes(1201, (200, 300), 4), None, 400),
        sample(batch, None, 47),
        sample(batch, 4, 151),
        sample(batch[:0], None, 6),
        sample(batch[:, :0], 4, 6),
        sample(torch.stack([degenerate, degenerate.flip(0)]), 2, 13),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["nms_padded"], make_samples(dtype, device))


def test_pads_and_truncates(device: torch.device) -> None:
    boxes = torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(3)], device=device)
    scores = torch.tensor([0.3, NAN, 0.7], device=device)
    for max_output, expected in ((5, [1, 2, 0, -1, -1]), (3, [1, 2, 0]), (2, [1, 2]), (0, [])):
        keep, count = nms_padded(boxes, scores, None, 0.5, max_output)
        assert keep.tolist() == expected
        assert count.item() == min(3, max_output)
        assert keep.dtype == count.dtype == torch.int64
        assert count.shape == ()


def test_equals_the_start_of_nms(device: torch.device) -> None:
    boxes = random_boxes(700, (100, 100), 0).to(device)
    scores = random_scores((700,), 0).to(device)
    idxs = random_groups((700,), 6, 0).to(device)
    kept, kept_in_groups = nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5)
    for max_output in (1, 63, 64, 65, 128, len(kept), 700):
        for groups, expected in ((None, kept), (idxs, kept_in_groups)):
            keep, count = nms_padded(boxes, scores, groups, 0.5, max_output)
            assert count.item() == min(len(expected), max_output)
            assert torch.equal(keep[: int(count)], expected[:max_output])
            assert (keep[int(count) :] == -1).all()


def test_images_do_not_affect_each_other(device: torch.device) -> None:
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]]] * 2, device=device)
    scores = torch.tensor([[0.1, 0.9], [0.9, 0.1]], device=device)
    keep, count = nms_padded(boxes, scores, None, 0.5, 2)
    assert keep.tolist() == [[1, -1], [0, -1]]
    assert count.tolist() == [1, 1]
    idxs = torch.tensor([[3, 3], [3, -4]], device=device)
    assert nms_padded(boxes, scores, idxs, 0.5, 2)[0].tolist() == [[1, -1], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(any_boxes(), st.sampled_from([None, 1, 3, 40]), st.sampled_from([0.0, 0.25, 0.6]), st.integers(0, 300))
def test_equals_the_reference(
    drawn: tuple[Tensor, Tensor], groups: int | None, iou_threshold: float, max_output: int
) -> None:
    boxes, scores = drawn
    idxs = None if groups is None else random_groups((len(boxes),), groups, len(boxes))
    args = (boxes, scores, idxs, iou_threshold, max_output)
    torch.testing.assert_close(nms_padded(*args), reference.nms_padded(*args), rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_in_a_cuda_graph() -> None:
    boxes = torch.stack([random_boxes(900, (200, 300), seed) for seed in range(2)]).cuda()
    scores = torch.rand(2, 900, device="cuda")
    nms_padded(boxes, scores, None, 0.5, 100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep, count = nms_padded(boxes, scores, None, 0.5, 100)
    scores.copy_(scores.flip(1))
    graph.replay()
    expected = reference.nms_padded(boxes, scores, None, 0.5, 100)
    torch.testing.assert_close((keep, count), expected, rtol=0, atol=0)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(nms_padded) == inspect.signature(reference.nms_padded)


BOXES = torch.zeros(4, 4)
SCORES = torch.zeros(4)
IDXS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("boxes", [[0.0, 0.0, 1.0, 1.0]], TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", torch.zeros(4, 5), ValueError),
        ("boxes", torch.zeros(4), ValueError),
        ("boxes", torch.zeros(1, 1, 4, 4), ValueError),
        ("scores", None, TypeError),
        ("scores", SCORES.long(), TypeError),
        ("scores", torch.zeros(3), ValueError),
        ("scores", torch.zeros(1, 4), ValueError),
        ("idxs", [0, 0, 0, 0], TypeError),
        ("idxs", IDXS.float(), TypeError),
        ("idxs", IDXS[:3], ValueError),
        ("idxs", IDXS[None], ValueError),
        ("iou_threshold", "0.5", TypeError),
        ("iou_threshold", NAN, ValueError),
        ("max_output", 2.0, TypeError),
        ("max_output", None, TypeError),
        ("max_output", -1, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "boxes": BOXES,
        "scores": SCORES,
        "idxs": IDXS,
        "iou_threshold": 0.5,
        "max_output": 2,
        argument: value,
    }
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        nms_padded(**arguments)


def test_bad_batches_are_refused() -> None:
    boxes = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"^scores: expected shape \[2, 3\]"):
        nms_padded(boxes, torch.zeros(3, 2), None, 0.5, 2)
    with pytest.raises(ValueError, match=r"^scores: expected shape \[B, N\]"):
        nms_padded(boxes, torch.zeros(3), None, 0.5, 2)
