from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import pytest
import torch

from panfpn_fast.ops import reference, roi_align
from support.op_checks import OPS, Sample, averaging_tolerance, run_op_checks
from support.op_samples import DEGENERATE_BOXES, half_covered, random_boxes, random_features, random_rois
from support.poison import default_algorithms

# Rows of 0 1 2 3 / 4 5 6 7 / ...: the value at (y, x) is 4 y + x, also between pixels.
RAMP = torch.arange(16.0).reshape(1, 1, 4, 4)


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    tolerance = averaging_tolerance(dtype)

    def sample(features: tuple[int, ...], boxes: Any, output_size: Any, **kwargs: Any) -> Sample:
        args = (random_features(features, seed=len(features)).to(dtype), boxes, output_size)
        return Sample(args, kwargs, tolerance).map_tensors(lambda tensor: tensor.to(device))

    fixed = {"spatial_scale": 0.25, "sampling_ratio": 2, "aligned": True}
    lists = [random_boxes(4, (36, 60), 3), torch.zeros(0, 4), random_boxes(3, (36, 60), 4)]
    degenerate = torch.cat([torch.zeros(len(DEGENERATE_BOXES), 1), DEGENERATE_BOXES], dim=1)
    strangers = torch.tensor(
        [[-1.0, 1, 1, 5, 5], [2, 1, 1, 5, 5], [float("nan"), 1, 1, 5, 5], [1e30, 1, 1, 5, 5]]
    )
    return [
        sample((3, 8, 13, 17), random_rois(11, 3, (52, 68), 0), (6, 7), **fixed),
        sample((2, 5, 9, 21), random_rois(7, 2, (36, 84), 1), (3, 4), **fixed),
        sample((2, 4, 6, 8), torch.zeros(0, 5), (5, 7), **fixed),
        sample((0, 3, 13, 17), torch.zeros(0, 5), (5, 7), **fixed),
        sample((2, 33, 25, 19), random_rois(9, 2, (50, 38), 2), 7, spatial_scale=0.5),
        sample((3, 2, 9, 15), lists, 3, spatial_scale=0.25, aligned=True),
        sample((2, 3, 11, 7), torch.cat([degenerate, strangers]), (2, 3), aligned=True),
        sample((2, 3, 11, 7), torch.cat([degenerate, strangers]), (2, 3), sampling_ratio=3),
        sample((2, 3, 11, 7), random_rois(5, 2, (11, 7), 5).double(), (2, 3), sampling_ratio=1),
        sample((2, 3, 11, 7), random_rois(5, 2, (11, 7), 6).bfloat16(), (2, 3)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["roi_align"], make_samples(dtype, device))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        # Samples at 0.5 and 2.5, or at 1 and 3 without the shift by half a pixel.
        ({"sampling_ratio": 1, "aligned": True}, [[2.5, 4.5], [10.5, 12.5]]),
        ({"sampling_ratio": 1, "aligned": False}, [[5.0, 7.0], [13.0, 15.0]]),
        # Samples at 0, 1 and 2, 3. The adaptive grid also has ceil(4 / 2) samples per bin.
        ({"sampling_ratio": 2, "aligned": True}, [[2.5, 4.5], [10.5, 12.5]]),
        ({"aligned": True}, [[2.5, 4.5], [10.5, 12.5]]),
        # Samples at 0.5, 1.5 and 2.5, 3.5, the last of which is clamped to the last pixel's centre.
        ({"aligned": False}, [[5.0, 6.75], [12.0, 13.75]]),
    ],
)
def test_whole_map_of_4_by_4(
    kwargs: dict[str, Any], expected: list[list[float]], device: torch.device
) -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]], device=device)
    pooled = roi_align(RAMP.to(device), boxes, 2, **kwargs)
    assert pooled.tolist() == [[expected]]


def test_zero_and_inverted_boxes(device: torch.device) -> None:
    boxes = [torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 3.0, 1.0, 1.0]], device=device)]
    ramp = RAMP.to(device)
    # The value at (x, y) = (0.5, 1.5) is 4 * 1.5 + 0.5. An inverted box is sampled backwards.
    backwards = [[4 * 2.0 + 2.0, 4 * 2.0 + 1.0], [4 * 1.0 + 2.0, 4 * 1.0 + 1.0]]
    pooled = roi_align(ramp, boxes, 2, sampling_ratio=1, aligned=True)
    assert pooled[:, 0].tolist() == [[[6.5, 6.5], [6.5, 6.5]], backwards]
    assert roi_align(ramp, boxes, 2, aligned=True).abs().max() == 0
    # Without `aligned`, each box is enlarged to one pixel, and samples are half a pixel apart.
    pooled = roi_align(ramp, boxes, 2, sampling_ratio=1)
    assert pooled[0, 0].tolist() == [[4 * 2.25 + 1.25, 4 * 2.25 + 1.75], [4 * 2.75 + 1.25, 4 * 2.75 + 1.75]]


@pytest.mark.parametrize("sampling_ratio", [-1, 0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_unusable_boxes_give_zeros(sampling_ratio: int, aligned: bool, device: torch.device) -> None:
    boxes = DEGENERATE_BOXES[~DEGENERATE_BOXES.isfinite().all(1)]
    strangers = torch.tensor([[-1.0, 0, 0, 4, 4], [1.0, 0, 0, 4, 4], [float("nan"), 0, 0, 4, 4]])
    rois = torch.cat([torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1), strangers]).to(device)
    pooled = roi_align(torch.ones(1, 2, 4, 4, device=device), rois, 3, 1.0, sampling_ratio, aligned)
    assert pooled.shape == (len(rois), 2, 3, 3)
    assert pooled.abs().max() == 0


def test_box_far_larger_than_the_map(device: torch.device) -> None:
    # One bin of 10,000 px has 10,000 samples along each axis, of which only those at -0.5, 0.5, 1.5, 2.5 and 3.5 count.
    boxes = torch.tensor([[0.0, -4999.5, -4999.5, 5000.5, 5000.5]], device=device)
    share = roi_align(torch.ones(1, 1, 4, 4, device=device), boxes, 1, aligned=True).item()
    assert share == pytest.approx(25 / 1e8, rel=1e-4)
    boxes = torch.tensor([[0.0, -1e30, 1.0, 1e30, 3.0], [0.0, 1.0, -1e12, 3.0, 1e12]], device=device)
    assert roi_align(torch.ones(1, 1, 4, 4, device=device), boxes, 1, aligned=True).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("samples", range(2, 26, 2))
def test_half_of_the_samples_is_exactly_half(samples: int, channels: int, device: torch.device) -> None:
    """The sum over the samples is divided by their number; a product with its reciprocal can be below one half."""
    masks = half_covered(samples).expand(-1, channels, -1, -1).to(device)
    side = masks.shape[-1]
    rois = torch.tensor([[float(i), 0.0, 0.0, side, side] for i in range(len(masks))], device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = roi_align(masks.contiguous(memory_format=layout), rois, 7, aligned=True)
        assert torch.equal(pooled, torch.full_like(pooled, 0.5))


def test_output_follows_the_layout_of_the_input(device: torch.device) -> None:
    boxes = random_rois(4, 2, (9, 9), 0).to(device)
    features = random_features((2, 6, 9, 9), 0).to(device)
    pooled = roi_align(features, boxes, 3)
    assert pooled.is_contiguous()
    pooled = roi_align(features.contiguous(memory_format=torch.channels_last), boxes, 3)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert not pooled.is_contiguous()
    one_channel = features[:, :1].contiguous()
    assert one_channel.is_contiguous(memory_format=torch.channels_last)
    assert roi_align(one_channel, boxes, 3).is_contiguous()


def test_list_and_rows_agree(device: torch.device) -> None:
    features = random_features((3, 4, 8, 8), 0).to(device)
    boxes = [random_boxes(count, (8, 8), count).to(device) for count in (2, 0, 5)]
    rows = [torch.nn.functional.pad(image_boxes, (1, 0), value=i) for i, image_boxes in enumerate(boxes)]
    assert torch.equal(roi_align(features, boxes, 3), roi_align(features, torch.cat(rows), 3))
    assert torch.equal(roi_align(features, tuple(boxes), (3, 3)), roi_align(features, boxes, 3))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 2])
def test_equals_torchvision(
    sampling_ratio: int, aligned: bool, device: torch.device, torchvision_ops: ModuleType
) -> None:
    features = random_features((2, 8, 27, 31), 0).to(device)
    # There are no inverted boxes, because torchvision fails on them with an adaptive grid.
    boxes = random_rois(60, 2, (110, 130), 1).to(device)
    args = (features, boxes, (5, 7), 0.25, sampling_ratio, aligned)
    tolerance = averaging_tolerance(torch.float32)
    with default_algorithms(device):  # with deterministic ones torchvision's kernel does not run
        expected = torchvision_ops.roi_align(*args)
    torch.testing.assert_close(roi_align(*args), expected, atol=tolerance.absolute, rtol=tolerance.relative)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(roi_align) == inspect.signature(reference.roi_align)


FEATURES = torch.zeros(2, 3, 8, 8)
BOXES = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("input", [[1.0]], TypeError),
        ("input", FEATURES.long(), TypeError),
        ("input", FEATURES[0], ValueError),
        ("boxes", None, TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], TypeError),
        ("boxes", BOXES[:, :4], ValueError),
        ("boxes", BOXES[0], ValueError),
        ("boxes", [BOXES, BOXES], ValueError),
        ("boxes", [BOXES[:, :4]], ValueError),
        ("output_size", None, TypeError),
        ("output_size", 3.5, TypeError),
        ("output_size", 0, ValueError),
        ("output_size", (3, -1), ValueError),
        ("output_size", (3, 3, 3), ValueError),
        ("spatial_scale", "1", TypeError),
        ("spatial_scale", 0.0, ValueError),
        ("spatial_scale", float("nan"), ValueError),
        ("sampling_ratio", 1.5, TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"input": FEATURES, "boxes": BOXES, "output_size": 7, argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        roi_align(**arguments)
