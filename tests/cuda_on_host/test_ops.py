"""Compiles every CUDA op, host function and kernels, for the CPU and compares it with its reference."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import panfpn_fast.ops
from cuda_on_host.build import ORDERS
from support.op_checks import OPS, assert_agrees, averaging_tolerance
from support.op_samples import DEGENERATE_BOXES, half_covered, random_rois

NAN = float("nan")
ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = [name for name, op in OPS.items() if op.cuda_in_csrc]


def op_samples(name: str) -> list[Any]:
    """Returns the samples that the op's own tests use for the CPU op, with float32 and float16 feature maps."""
    path = ROOT / "tests" / "ops" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"samples_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dtypes = (torch.float32, torch.float16) if "roi_align" in name else (torch.float32,)
    return [sample for dtype in dtypes for sample in module.make_samples(dtype, torch.device("cpu"))]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, host_library: ctypes.CDLL) -> None:
    """Makes the public functions call the CUDA ops that were compiled for the CPU."""
    for name in CUDA_OPS:
        monkeypatch.setattr(torch.ops.panfpn_fast, name, getattr(torch.ops.panfpn_fast_cuda_on_host, name))


@pytest.mark.parametrize("name", CUDA_OPS)
def test_kernels_agree_with_the_reference(
    name: str, thread_order: str, on_host: None, host_library: ctypes.CDLL
) -> None:
    launches = host_library.panfpn_host_launch_count()
    for i, sample in enumerate(op_samples(name)):
        expected = sample.run(OPS[name].reference)
        actual = sample.run(OPS[name].function)
        assert_agrees(actual, expected, sample.tolerance, f"{name}, sample {i}, {thread_order}")
        strided = sample.map_tensors(lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 1])
        assert_agrees(
            strided.run(OPS[name].function), expected, sample.tolerance, f"{name}, sample {i}, strided"
        )
    assert host_library.panfpn_host_launch_count() > launches, "no kernel ran"


def test_channels_last_kernel(on_host: None, thread_order: str) -> None:
    features = torch.randn(2, 37, 19, 23, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[1.0, 2.0, 60.0, 50.0], [-9.0, 5.0, 30.0, 300.0]]), torch.zeros(0, 4)]
    for sampling_ratio in (0, 2):
        args = (boxes, (3, 5), 0.25, sampling_ratio, True)
        expected = OPS["roi_align"].reference(features, *args)
        actual = panfpn_fast.ops.roi_align(features.to(memory_format=torch.channels_last), *args)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 5, 8, 132])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_loads_of_channels(
    channels: int, dtype: torch.dtype, on_host: None, host_library: ctypes.CDLL
) -> None:
    """Full 16-byte packs, lanes without channels, more channels than lanes, and channels that fill no pack."""
    features = torch.randn(1, channels, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Boxes with few samples, with more samples than a warp has lanes, and with few samples that are further apart
    # than a warp has lanes.
    boxes = torch.tensor(
        [[0.0, 1.0, 2.0, 8.0, 7.0], [0.0, -90.0, -70.0, 90.0, 80.0], [9.0, 0.0, 0.0, 5.0, 5.0]]
    )
    for sampling_ratio in (0, 2):
        args = (boxes, (2, 3), 1.0, sampling_ratio, True)
        expected = OPS["roi_align"].reference(features, *args)
        actual = panfpn_fast.ops.roi_align(features.to(memory_format=torch.channels_last), *args)
        tolerance = averaging_tolerance(dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance.relative, atol=tolerance.absolute)


@pytest.mark.parametrize("output_size", [(2, 7), (3, 8), (1, 16), (600, 1)], ids=str)
@pytest.mark.parametrize("sampling_ratio", [0, 3, 40])
def test_columns_of_bins(
    output_size: tuple[int, int], sampling_ratio: int, on_host: None, thread_order: str
) -> None:
    """Channels-last: one block or several for the columns of a box, and every number of pixels in a column.

    The taps of 40 samples in a bin do not fit in shared memory if the map is large enough, nor do those of 600 rows.
    """
    features = torch.randn(2, 5, 44, 70, generator=torch.Generator().manual_seed(0))
    features[1, :, 20, 30] = torch.tensor([float("inf"), -float("inf"), NAN, 1e30, 1e-30])
    widths = torch.cat([torch.arange(1.0, 70.0, 4.0), torch.tensor([-9.0, 300.0])])
    heights = widths.flip(0) * 0.6
    corner = torch.rand(len(widths), 2, generator=torch.Generator().manual_seed(1)) * 3
    image = torch.arange(len(widths))[:, None] % 3  # there is no third image
    rois = torch.cat([image, corner, corner + torch.stack([widths, heights], dim=1)], dim=1)
    args = (rois, output_size, 1.0, sampling_ratio, True)
    expected = OPS["roi_align"].reference(features, *args)
    actual = panfpn_fast.ops.roi_align(features.to(memory_format=torch.channels_last), *args)
    tolerance = averaging_tolerance(torch.float32)
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=True
    )


@pytest.mark.parametrize("channels", [1, 6, 67])
@pytest.mark.parametrize(
    ("output_size", "sampling_ratio"),
    [((2, 3), 0), ((28, 17), 2), ((3, 2), 100), ((24, 2), 17), ((1, 400), 1)],
    ids=["few bins", "bins in several rounds", "one bin at a time", "too many samples", "too many bins"],
)
def test_planes_of_channels(
    channels: int, output_size: tuple[int, int], sampling_ratio: int, on_host: None, thread_order: str
) -> None:
    """NCHW: channels that fill no group of planes, and boxes whose taps fit in shared memory or do not."""
    features = torch.randn(2, channels, 9, 11, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor(
        [
            [1.0, 1.0, 2.0, 8.0, 7.0],
            [0.0, -90.0, -70.0, 90.0, 80.0],
            [0.0, 9.0, 8.0, 2.0, 1.0],
            [1.0, 10.5, 8.5, 11.0, 9.0],
            [0.0, 1e3, 1e3, 2e3, 2e3],
            [7.0, 0.0, 0.0, 5.0, 5.0],
        ]
    )
    args = (features, rois, output_size, 1.0, sampling_ratio, True)
    expected = OPS["roi_align"].reference(*args)
    tolerance = averaging_tolerance(torch.float32)
    assert_agrees(panfpn_fast.ops.roi_align(*args), expected, tolerance, thread_order)


@pytest.mark.parametrize(
    ("map_size", "output_size", "sampling_ratio"),
    [((3, 300), (2, 7), 0), ((90, 80), (7, 7), 2), ((1, 9), (600, 5), 0), ((9, 1), (3, 641), 1)],
    ids=["one bin at a time", "distant samples", "many rows", "too many columns"],
)
def test_planes_of_large_and_small_maps(
    map_size: tuple[int, int],
    output_size: tuple[int, int],
    sampling_ratio: int,
    on_host: None,
    thread_order: str,
) -> None:
    """NCHW: bins that touch more pixels than a warp sums at once, few of many pixels, and maps of one row or column."""
    height, width = map_size
    features = torch.randn(1, 5, *map_size, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0.0, 0.4, 0.2, width, height], [0.0, 0.7 * width, 0.1, 0.2 * width, 0.9 * height]])
    args = (features, rois, output_size, 1.0, sampling_ratio, True)
    expected = OPS["roi_align"].reference(*args)
    tolerance = averaging_tolerance(torch.float32)
    assert_agrees(panfpn_fast.ops.roi_align(*args), expected, tolerance, thread_order)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("samples", [2, 6, 10, 12, 34, 60])
def test_half_of_the_samples_is_exactly_half(samples: int, channels: int, on_host: None) -> None:
    """A warp has fewer lanes than 34 samples, and the taps of 60 samples do not fit in shared memory."""
    masks = half_covered(samples).expand(-1, channels, -1, -1)
    side = masks.shape[-1]
    rois = torch.tensor([[float(i), 0.0, 0.0, side, side] for i in range(len(masks))])
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = panfpn_fast.ops.roi_align(masks.contiguous(memory_format=layout), rois, 7, aligned=True)
        assert torch.equal(pooled, torch.full_like(pooled, 0.5))


def backward_calls(name: str) -> list[tuple[Any, ...]]:
    """Returns arguments of the backward op except the last, with odd and degenerate inputs, all layouts and dtypes."""
    calls: list[tuple[Any, ...]] = []
    random = torch.Generator().manual_seed(5)
    degenerate = torch.cat([torch.zeros(len(DEGENERATE_BOXES), 1), DEGENERATE_BOXES], dim=1)
    for channels, pooled, sampling_ratio in (
        (5, (3, 2), 0),
        (8, (7, 7), 2),
        (132, (1, 9), 0),
        (4, (2, 35), 0),
        (4, (600, 1), 0),  # the taps do not fit in shared memory
    ):
        rois = torch.cat([random_rois(9, 2, (52, 68), channels), degenerate, torch.full((1, 5), 7.0)])
        for dtype in (torch.float32, torch.float16):
            for channels_last in (False, True):
                grad = torch.randn(len(rois), channels, *pooled, generator=random).to(dtype)
                if channels_last:
                    grad = grad.contiguous(memory_format=torch.channels_last)
                if name == "roi_align":
                    calls.append((grad, rois, 0.25, sampling_ratio, True, 2, 13, 17, channels_last))
                else:
                    levels = ([0.25, 0.125], sampling_ratio, False, 32.0, 3, 1e-8)
                    calls.append((grad, rois, *levels, 2, [13, 7], [17, 9], channels_last))
    return calls


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["roi_align", "multiscale_roi_align"])
def test_backward_kernels_agree_with_the_cpu(
    name: str, deterministic: bool, thread_order: str, host_library: ctypes.CDLL
) -> None:
    host_op = getattr(torch.ops.panfpn_fast_cuda_on_host, f"{name}_backward")
    cpu_op = getattr(torch.ops.panfpn_fast, f"{name}_backward")
    for i, call in enumerate(backward_calls(name)):
        actual, expected = host_op(*call, deterministic), cpu_op(*call, deterministic)
        assert_agrees(
            actual, expected, averaging_tolerance(call[0].dtype), f"{name}, call {i}, {thread_order}"
        )


@pytest.mark.parametrize("name", ["roi_align", "multiscale_roi_align"])
def test_deterministic_backward_does_not_depend_on_the_order_of_threads(
    name: str, host_library: ctypes.CDLL
) -> None:
    host_op = getattr(torch.ops.panfpn_fast_cuda_on_host, f"{name}_backward")
    results = []
    for order in ORDERS.values():
        host_library.panfpn_host_set_order(order, 1)
        results.append([host_op(*call, True) for call in backward_calls(name)[:4]])
    host_library.panfpn_host_set_order(ORDERS["forward"], 0)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_threshold_follows_the_cuda_peer(on_host: None) -> None:
    # The IoU of 30 / 100 equals 0.3 in float32 but is greater than the double 0.3.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]])
    assert panfpn_fast.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.3).tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection", "panopticapi"])
def test_merge_with_many_claims(on_host: None, thread_order: str, rule: str) -> None:
    """Instances that overlap repeatedly: every thread must see the pixels that earlier instances have claimed."""
    random = torch.Generator().manual_seed(3)
    corner = torch.rand(60, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + 10 + 50 * torch.rand(60, 2, generator=random)], dim=1)
    masks = torch.rand(60, 28, 20, generator=random)
    scores, classes = torch.rand(60, generator=random), torch.arange(60)
    semantic = torch.randint(0, 9, (77, 101), generator=random)
    kwargs: dict[str, Any] = {
        "score_threshold": 0.1,
        "overlap_threshold": 0.7,
        "stuff_area_threshold": 20,
        "rule": rule,
    }
    args = (masks, boxes, scores, classes, semantic, (77, 101))
    actual = panfpn_fast.ops.panoptic_merge(*args, **kwargs)
    expected = OPS["panoptic_merge"].reference(*args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_merge_of_instances_that_share_a_wave(on_host: None, thread_order: str) -> None:
    """Many small boxes with few overlaps, over rows of more than one piece, which gives waves of every length."""
    random = torch.Generator().manual_seed(5)
    corner = torch.rand(90, 2, generator=random) * torch.tensor([290.0, 30.0])
    boxes = torch.cat([corner, corner + 3 + 9 * torch.rand(90, 2, generator=random)], dim=1)
    masks, scores = torch.rand(90, 7, 5, generator=random), torch.rand(90, generator=random)
    semantic = torch.randint(0, 9, (37, 301), generator=random).to(torch.uint8)
    args = (masks, boxes, scores, torch.arange(90), semantic, (37, 301))
    kwargs: dict[str, Any] = {"score_threshold": 0.1, "stuff_area_threshold": 900}
    for max_segments in (0, 20, 120):
        actual = panfpn_fast.ops.panoptic_merge_padded(*args, **kwargs, max_segments=max_segments)
        expected = OPS["panoptic_merge_padded"].reference(*args, **kwargs, max_segments=max_segments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "image_size", "rule"),
    [(3, (800, 670), "detectron2"), (300, (70000, 1), "panopticapi"), (8200, (3, 40), "detectron2")],
    ids=["bitmap in global memory", "several batches", "sorted order"],
)
def test_merge_of_much(
    count: int, image_size: tuple[int, int], rule: str, on_host: None, host_library: ctypes.CDLL
) -> None:
    """A bitmap beyond the shared memory of the smallest GPU, bits beyond one batch, more scores than are ranked."""
    height, width = image_size
    random = torch.Generator().manual_seed(7)
    corner = torch.rand(count, 2, generator=random) * torch.tensor([width - 1.0, height * 0.9])
    extent = 1 + torch.rand(count, 2, generator=random) * torch.tensor([0.4 * width, min(height, 900.0)])
    boxes = torch.cat([corner, corner + extent], dim=1)
    masks = torch.rand(count, 3, 3, generator=random) + 0.4
    scores = (torch.rand(count, generator=random) * 500).round() / 500
    scores[:2] = NAN
    semantic = torch.randint(0, 3, image_size, generator=random, dtype=torch.uint8)
    args = (masks, boxes, scores, torch.arange(count), semantic, image_size)
    launches = host_library.panfpn_host_launch_count()
    kwargs: dict[str, Any] = {"score_threshold": 0.5, "stuff_area_threshold": 5, "rule": rule}
    actual = panfpn_fast.ops.panoptic_merge(*args, **kwargs)
    expected = OPS["panoptic_merge"].reference(*args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    batches = 2 if count == 300 else 1
    assert host_library.panfpn_host_launch_count() - launches == 2 + 3 * batches


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection", "panopticapi"])
@pytest.mark.parametrize("overlap_threshold", [-0.5, 0.0, 1 / 3, 0.5, 1.0, float("inf")])
def test_merge_at_the_overlap_threshold(
    overlap_threshold: float, rule: str, on_host: None, thread_order: str
) -> None:
    """Shares of n / 12, some of which equal the threshold."""
    boxes = torch.tensor([[0.0, 0.0, 6.0, 1.0]] + [[6.0 - i, 0.0, 18.0 - i, 1.0] for i in range(13)])
    masks = torch.ones(14, 1, 1)
    for second in range(1, 14):
        chosen = torch.tensor([0, second])
        args = (
            masks[:2],
            boxes[chosen],
            torch.tensor([0.9, 0.8]),
            chosen,
            torch.zeros(1, 40, dtype=torch.int64),
        )
        kwargs: dict[str, Any] = {"overlap_threshold": overlap_threshold, "rule": rule}
        actual = panfpn_fast.ops.panoptic_merge(*args, (1, 40), **kwargs)
        expected = OPS["panoptic_merge"].reference(*args, (1, 40), **kwargs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0])
def test_paste_over_several_tiles(threshold: float, on_host: None, thread_order: str) -> None:
    """Images of three tiles that do not begin at a multiple of 16, and boxes with more rows than one warp handles."""
    random = torch.Generator().manual_seed(6)
    masks = torch.rand(5, 9, 6, generator=random)
    boxes = torch.tensor(
        [
            [-5.0, -3.0, 390.0, 150.0],
            [3.5, 80.5, 131.0, 90.0],
            [200.0, 133.0, 20.0, 1.0],
            [0.0, 0.0, 999.0, 4.0],
            [NAN, 0.0, 9.0, 9.0],
        ]
    )
    args = (masks, boxes, (173, 397), threshold)
    assert torch.equal(panfpn_fast.ops.paste_masks(*args), OPS["paste_masks"].reference(*args))


@pytest.mark.parametrize("image_size", [(1, 1), (3, 1), (1, 17), (5, 3), (4, 8), (3, 16)])
def test_paste_into_images_of_few_bytes(
    image_size: tuple[int, int], on_host: None, thread_order: str
) -> None:
    """Images of which several share one 16-byte chunk, or that end in the middle of a chunk."""
    random = torch.Generator().manual_seed(7)
    corner = torch.rand(21, 2, generator=random) * 6 - 3
    boxes = torch.cat([corner, corner + 8 * torch.rand(21, 2, generator=random)], dim=1)
    args = (torch.rand(21, 3, 4, generator=random), boxes, image_size, 0.5)
    assert torch.equal(panfpn_fast.ops.paste_masks(*args), OPS["paste_masks"].reference(*args))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 129, 1000, 1201])
def test_suppression_at_the_edges_of_tiles(count: int, on_host: None, thread_order: str) -> None:
    """Long chains of overlapping boxes: whether a box is kept depends on many boxes of its own and other tiles."""
    random = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=random) * torch.tensor([3.0 * count**0.5, 40.0])
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(count, 2, generator=random)], dim=1)
    scores = (torch.rand(count, generator=random) * 500).round() / 500
    idxs = torch.randint(0, 3, (count,), generator=random)
    for groups in (None, idxs):
        for max_output in (count, count // 4 + 1):
            args = (boxes, scores, groups, 0.2, max_output)
            actual = panfpn_fast.ops.nms_padded(*args)
            torch.testing.assert_close(actual, OPS["nms_padded"].reference(*args), rtol=0, atol=0)


def test_suppression_in_sorted_order(on_host: None) -> None:
    """More boxes than are ranked by counting, so they are sorted, in a batch with different orders."""
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 8193, 2, generator=random) * 30
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(2, 8193, 2, generator=random)], dim=2)
    scores = torch.rand(2, 8193, generator=random)
    # NaN comes first, whatever its sign, as it does where the scores are ranked by counting.
    scores[:, [5, 6]] = torch.tensor([NAN, NAN]).copysign(torch.tensor([1.0, -1.0]))
    args = (boxes, scores, None, 0.3, 40)
    actual = panfpn_fast.ops.nms_padded(*args)
    torch.testing.assert_close(actual, OPS["nms_padded"].reference(*args), rtol=0, atol=0)


@pytest.mark.parametrize(("capability", "kib"), [(75, 64), (86, 99), (90, 227)])
def test_more_boxes_than_shared_memory_allows(
    capability: int, kib: int, on_host: None, host_library: ctypes.CDLL
) -> None:
    most = (kib * 1024 - 32) // 8 * 64
    boxes = torch.zeros(most + 1, 4)
    host_library.panfpn_host_set_compute_capability(capability)
    try:
        with pytest.raises(
            RuntimeError, match=f"at most {most} boxes are supported on this GPU, got {most + 1}"
        ):
            panfpn_fast.ops.nms_padded(boxes, boxes[:, 0], None, 0.5, 1)
    finally:
        host_library.panfpn_host_set_compute_capability(75)
