from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import paste_masks, reference
from panfpn_fast.ops.reference.paste_masks import paste_values
from support.op_checks import FLIP_MARGIN, OPS, Sample, Tolerance, run_op_checks
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes, random_masks

INF, NAN = float("inf"), float("nan")


def undecided_pixels(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float) -> Tensor:
    """Returns the pixels whose value is within FLIP_MARGIN of the threshold, or of a step of the uint8 output."""
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    planes = masks.reshape(len(masks), *masks.shape[-2:]).to(dtype)
    values = [paste_values(mask, box, image_size) for mask, box in zip(planes, boxes.to(dtype), strict=True)]
    value = torch.stack(values) if values else planes.new_zeros(0, *image_size)
    if threshold >= 0:
        undecided = (value - threshold).abs() < FLIP_MARGIN
    else:
        undecided = (value * 255 - (value * 255).round()).abs() < 255 * FLIP_MARGIN
    # Pixels outside all masks have the value zero on every device.
    return undecided & (value != 0)


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> Sample:
        masks, boxes = masks.to(dtype), boxes.to(dtype)
        undecided = undecided_pixels(masks, boxes, image_size, threshold).to(device)
        tolerance = Tolerance("Rounding decides pixels at the threshold.", undecided=undecided)
        args = (masks.to(device), boxes.to(device), image_size, threshold)
        return Sample(args, tolerance=tolerance)

    degenerate = random_masks(len(DEGENERATE_BOXES), 14, 14, 9)
    return [
        sample(random_masks(5, 28, 28, 0), random_boxes(5, (67, 93), 0), (67, 93)),
        sample(random_masks(3, 14, 17, 1), random_boxes(3, (41, 30), 1) - 9, (41, 30)),
        sample(torch.zeros(0, 28, 28), torch.zeros(0, 4), (67, 93)),
        sample(random_masks(4, 28, 28, 2), random_boxes(4, (3, 5), 2), (3, 5)),
        sample(random_masks(4, 28, 28, 2)[:, None], random_boxes(4, (33, 35), 2), (33, 35)),
        sample(random_masks(2, 28, 28, 3), random_boxes(2, (67, 93), 3), (0, 93)),
        sample(degenerate, DEGENERATE_BOXES, (21, 23)),
        sample(random_masks(2, 1, 1, 4), random_boxes(2, (21, 23), 4), (21, 23)),
        sample(random_masks(3, 28, 28, 5), random_boxes(3, (67, 93), 5), (67, 93), -1.0),
        sample(degenerate, DEGENERATE_BOXES, (21, 23), -1.0),
        sample(degenerate, DEGENERATE_BOXES, (21, 23), 0.0),
        sample(torch.zeros(0, 28, 28), torch.zeros(0, 4), (67, 93), -1.0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["paste_masks"], make_samples(dtype, device))


def paste_one(mask: Tensor, box: list[float], device: torch.device, threshold: float = 0.5) -> Tensor:
    """Pastes into an image of 64 x 64."""
    pasted = paste_masks(mask[None].to(device), torch.tensor([box], device=device), (64, 64), threshold)
    assert pasted.shape == (1, 64, 64)
    assert pasted.dtype == (torch.uint8 if threshold < 0 else torch.bool)
    return pasted[0].cpu()


# Number of pixels that detectron2's paste_masks_in_image sets when it evaluates every pixel.
@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ([10.0, 10.0, 20.0, 20.0], 100),
        ([10.5, 10.5, 20.5, 20.5], 117),
        ([10.0, 10.0, 10.0, 20.0], 0),
        ([10.0, 10.0, 20.0, 10.0], 0),
        ([20.0, 20.0, 10.0, 10.0], 100),
        ([100.0, 100.0, 110.0, 110.0], 0),
        ([-110.0, 10.0, -100.0, 20.0], 0),
        ([0.0, 0.0, 64.0, 64.0], 64 * 64),
        ([NAN, 10.0, 20.0, 20.0], 0),
        ([10.0, 10.0, INF, 20.0], 0),
        ([-INF, -INF, INF, INF], 0),
    ],
)
def test_pixels_of_a_full_mask(box: list[float], pixels: int, device: torch.device) -> None:
    assert paste_one(torch.ones(28, 28), box, device).sum() == pixels


def test_pixels_are_inside_the_box(device: torch.device) -> None:
    pasted = paste_one(torch.ones(28, 28), [10.0, 5.0, 20.0, 11.0], device)
    assert pasted[5:11, 10:20].all()
    assert pasted.sum() == 60


def test_threshold_zero_paints_everything(device: torch.device) -> None:
    assert paste_one(torch.ones(28, 28), [10.0, 10.0, 20.0, 20.0], device, threshold=0.0).all()
    assert paste_one(torch.ones(28, 28), [NAN, 10.0, 20.0, 20.0], device, threshold=0.0).all()


def test_values_fall_off_at_the_rim(device: torch.device) -> None:
    # A mask pixel covers 2.5 px, so the outermost mask pixels have their centres at 11.25 and 18.75. The zeros outside
    # have a weight of 0.3 at the pixel centres 10.5 and 19.5.
    mask, box = torch.ones(4, 4), [10.0, 10.0, 20.0, 20.0]
    pasted = paste_one(mask, box, device, threshold=0.99)
    assert pasted[11:19, 11:19].all()
    assert pasted.sum() == 64
    assert paste_one(mask, box, device, threshold=0.69).sum() == 100 - 4


def test_the_threshold_itself_is_painted(device: torch.device) -> None:
    # A mask pixel covers one image pixel, so every pixel has exactly the value of a mask pixel.
    mask = torch.tensor([[0.25, 0.5], [0.75, 1.0]])
    assert paste_one(mask, [8.0, 8.0, 10.0, 10.0], device)[8:10, 8:10].tolist() == [
        [False, True],
        [True, True],
    ]
    assert paste_one(mask, [10.0, 8.0, 8.0, 10.0], device)[8:10, 8:10].tolist() == [
        [True, False],
        [True, True],
    ]


def test_negative_threshold_gives_truncated_values(device: torch.device) -> None:
    mask = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    pasted = paste_one(mask, [8.0, 8.0, 10.0, 10.0], device, threshold=-1.0)
    assert pasted[8:10, 8:10].tolist() == [[0, 63], [127, 255]]
    assert paste_one(mask, [8.0, 8.0, 12.0, 12.0], device, threshold=-1.0)[9].tolist()[8:12] == [
        23,
        51,
        91,
        83,
    ]


def test_no_masks(device: torch.device) -> None:
    masks, boxes = torch.zeros(0, 28, 28, device=device), torch.zeros(0, 4, device=device)
    for threshold, dtype in ((0.5, torch.bool), (0.0, torch.bool), (-1.0, torch.uint8)):
        pasted = paste_masks(masks, boxes, (5, 7), threshold)
        assert pasted.shape == (0, 5, 7)
        assert pasted.dtype == dtype


def test_half_precision_masks_keep_the_grid_in_float32(device: torch.device) -> None:
    # With a sampling grid in bfloat16, the edges of a box of 1,000 px would be wrong by several pixels.
    box = torch.tensor([[3.0, 2.0, 1003.0, 7.0]], device=device)
    pasted = paste_masks(torch.ones(1, 28, 28, dtype=torch.bfloat16, device=device), box, (10, 1010))
    assert pasted.sum() == 5000


@pytest.mark.parametrize("extent", [0.2, 1.0], ids=["few rows", "most rows"])
@pytest.mark.parametrize("threshold", [0.5, 0.0])
def test_output_larger_than_allocators_keep(extent: float, threshold: float) -> None:
    """Above 32 MiB the CPU op does not write around the boxes; earlier contents of that memory must not show."""
    image_size = (1020, 1111)
    masks = random_masks(30, 14, 14, 0)
    corner = torch.rand(30, 2, generator=generator(0)) * (1 - extent)
    boxes = torch.cat([corner, corner + extent], dim=1) * torch.tensor([1111.0, 1020.0] * 2)
    pasted = paste_masks(masks, boxes, image_size, threshold)
    for n in range(len(masks)):
        one = paste_masks(masks[n : n + 1], boxes[n : n + 1], image_size, threshold)
        assert torch.equal(pasted[n], one[0])


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.floats(-20, 40, width=32)] * 4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(0, 19), st.integers(0, 19)),
    st.sampled_from([0.5, 0.3, 0.0, -1.0]),
)
def test_any_box(
    box: tuple[float, ...], mask_size: tuple[int, int], image_size: tuple[int, int], threshold: float
) -> None:
    masks, boxes = random_masks(1, *mask_size, seed=1), torch.tensor([box])
    undecided = undecided_pixels(masks, boxes, image_size, threshold)
    different = paste_masks(masks, boxes, image_size, threshold) != reference.paste_masks(
        masks, boxes, image_size, threshold
    )
    assert not (different & ~undecided).any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 300),
    st.tuples(st.integers(1, 40), st.integers(1, 90)),
    st.tuples(st.integers(1, 12), st.integers(1, 30)),
    st.sampled_from([0.5, 0.01, 0.0, -1.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_masks(
    count: int,
    image_size: tuple[int, int],
    mask_size: tuple[int, int],
    threshold: float,
    saturated: bool,
    seed: int,
) -> None:
    # Bit-exact: the native op skips only pixels whose side of the threshold no rounding can change. Saturated masks
    # have large parts of such pixels, and mask pixels exactly at the threshold.
    random = generator(seed)
    masks = torch.rand(count, *mask_size, generator=random)
    masks = (masks * 3).round() / 3 if saturated else masks
    masks[torch.rand(masks.shape, generator=random) < 0.02] = 0.5
    boxes = random_boxes(count, image_size, seed)
    strange = torch.rand(count, generator=random) < 0.1
    boxes[strange] = DEGENERATE_BOXES[torch.randint(0, 12, (int(strange.sum()),), generator=random)]
    expected = reference.paste_masks(masks, boxes, image_size, threshold)
    assert torch.equal(paste_masks(masks, boxes, image_size, threshold), expected)


@pytest.mark.parametrize("strange", [NAN, INF, -INF, 3e38, -1.0, 1e-40])
def test_masks_of_any_value(strange: float) -> None:
    masks = random_masks(3, 9, 7, 0)
    masks[torch.rand(3, 9, 7, generator=generator(1)) < 0.1] = strange
    boxes = random_boxes(3, (40, 50), 2)
    for threshold in (0.5, 0.0, 1e-40):
        pasted = paste_masks(masks, boxes, (40, 50), threshold)
        assert torch.equal(pasted, reference.paste_masks(masks, boxes, (40, 50), threshold))


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(paste_masks) == inspect.signature(reference.paste_masks)


MASKS = torch.zeros(4, 28, 28)
BOXES = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("masks", [[1.0]], TypeError),
        ("masks", MASKS.long(), TypeError),
        ("masks", MASKS[0], ValueError),
        ("masks", torch.zeros(4, 2, 28, 28), ValueError),
        ("boxes", None, TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", BOXES[:3], ValueError),
        ("boxes", torch.zeros(4, 5), ValueError),
        ("image_size", 64, TypeError),
        ("image_size", (64.0, 64.0), TypeError),
        ("image_size", (64, -1), ValueError),
        ("image_size", (64, 64, 3), ValueError),
        ("threshold", "0.5", TypeError),
        ("threshold", NAN, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"masks": MASKS, "boxes": BOXES, "image_size": (64, 64), argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        paste_masks(**arguments)
