from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from panfpn_fast.ops import panoptic_merge, panoptic_merge_padded
from support.mask_samples import merge_samples
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import generator, random_boxes, random_masks


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    limits = (0, 30, 5, 30, 31, 3, 13, 7, 40)
    return [
        Sample(sample.args, {**sample.kwargs, "max_segments": limit}, sample.tolerance)
        for sample, limit in zip(merge_samples(dtype, device), limits, strict=False)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["panoptic_merge_padded"], make_samples(dtype, device))


def arguments(device: torch.device) -> tuple[Any, ...]:
    """Returns twelve instances and five labels in an image of 60 x 80."""
    tensors = (
        random_masks(12, 28, 28, 0),
        random_boxes(12, (60, 80), 0) * 0.5,
        torch.rand(12, generator=generator(0)),
        torch.arange(12),
        torch.randint(0, 6, (60, 80), generator=generator(0)),
    )
    return (*(tensor.to(device) for tensor in tensors), (60, 80))


def test_pads_and_truncates_the_segments(device: torch.device) -> None:
    given = arguments(device)
    panoptic, segments = panoptic_merge(*given, stuff_area_threshold=10)
    total = len(segments.id)
    assert total > 6
    for max_segments in (0, 1, 4, total, total + 1, 50):
        same, padded, count = panoptic_merge_padded(
            *given, max_segments=max_segments, stuff_area_threshold=10
        )
        assert torch.equal(same, panoptic)
        assert count.shape == ()
        assert count.item() == total
        kept = min(total, max_segments)
        for got, expected, nothing in zip(padded, segments, (0, False, -1, 0.0, 0, -1), strict=True):
            assert got.shape == (max_segments,)
            assert got.dtype == expected.dtype
            assert torch.equal(got[:kept], expected[:kept])
            assert (got[kept:] == nothing).all()


def test_padded_instances_do_not_count(device: torch.device) -> None:
    masks, boxes, scores, classes, semantic, size = arguments(device)
    expected = panoptic_merge_padded(masks, boxes, scores, classes, semantic, size, max_segments=20)
    padded = panoptic_merge_padded(
        torch.cat([masks, masks]),
        torch.cat([boxes, boxes]),
        torch.cat([scores, torch.full_like(scores, float("-inf"))]),
        torch.cat([classes, classes]),
        semantic,
        size,
        max_segments=20,
    )
    torch.testing.assert_close(padded, expected, rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
def test_cuda_graph() -> None:
    given = arguments(torch.device("cuda"))
    expected = panoptic_merge_padded(*given, max_segments=20, stuff_area_threshold=10)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = panoptic_merge_padded(*given, max_segments=20, stuff_area_threshold=10)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
    given[2].copy_(given[2].flip(0))
    graph.replay()
    expected = panoptic_merge_padded(*given, max_segments=20, stuff_area_threshold=10)
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("max_segments", -1, ValueError),
        ("max_segments", 2.5, TypeError),
        ("max_segments", None, TypeError),
        ("rule", "coco", ValueError),
        ("semantic", torch.zeros(60, 80), TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    names = ("masks", "boxes", "scores", "classes", "semantic", "image_size")
    given = dict(zip(names, arguments(torch.device("cpu")), strict=True))
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        panoptic_merge_padded(**{**given, "max_segments": 9, argument: value})
