from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import paste_masks, paste_masks_rle, reference
from panfpn_fast.ops.reference.paste_masks_rle import compress
from support.mask_samples import is_decided
from support.op_checks import OPS, Sample, run_op_checks
from support.op_samples import DEGENERATE_BOXES, generator, random_boxes, random_masks

INF, NAN = float("inf"), float("nan")


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(
        count: int,
        image_size: tuple[int, int],
        mask_size: tuple[int, int] = (28, 28),
        boxes: Tensor | None = None,
        threshold: float = 0.5,
    ) -> Sample:
        """Uses the first seed for which rounding decides no pixel."""
        for seed in range(100):
            masks = random_masks(count, *mask_size, seed=seed).to(dtype)
            placed = (random_boxes(count, image_size, seed) if boxes is None else boxes).to(dtype)
            if is_decided(masks, placed, image_size, threshold):
                return Sample((masks.to(device), placed.to(device), image_size, threshold))
        raise AssertionError("every seed from 0 to 99 has pixels that rounding decides")

    return [
        sample(5, (67, 93)),
        sample(3, (41, 30), (14, 17)),
        sample(0, (67, 93)),
        sample(4, (3, 5)),
        sample(2, (0, 93)),
        sample(2, (93, 0)),
        sample(12, (21, 23), (14, 14), boxes=DEGENERATE_BOXES),
        sample(12, (21, 23), (14, 14), boxes=DEGENERATE_BOXES, threshold=0.0),
        sample(4, (30, 31), threshold=0.3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["paste_masks_rle"], make_samples(dtype, device))


def test_dispatcher_op_works_in_a_graph(device: torch.device) -> None:
    masks, boxes = random_masks(5, 28, 28, 0).to(device), random_boxes(5, (67, 93), 0).to(device)
    op = torch.ops.panfpn_fast.paste_masks_rle

    def total(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        strings, offsets = op(masks, boxes, 67, 93, 0.5)
        return strings, offsets, strings.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 3):
        expected = total(masks[:count], boxes[:count])
        torch.testing.assert_close(compiled(masks[:count], boxes[:count]), expected, rtol=0, atol=0)


def decode(encoded: dict[str, Any]) -> Tensor:
    """Decodes the compressed string by the description of the format, independently of the encoder."""
    height, width = encoded["size"]
    lengths: list[int] = []
    value = shift = 0
    for byte in encoded["counts"]:
        group = byte - 48
        assert 0 <= group < 64
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value = shift = 0
    assert sum(lengths) == height * width
    assert all(length > 0 for length in lengths[1:])
    bits = [i % 2 for i, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(bits, dtype=torch.bool).reshape(width, height).T


def test_known_strings(device: torch.device) -> None:
    # In an image of 4 x 5 the box covers rows 1 and 2 of columns 1 and 2. The lengths are 5 2 2 2 9; the last two are
    # encoded as their difference to the length two places before, 2 in both cases.
    boxes = torch.tensor([[1.0, 1.0, 3.0, 3.0], [9.0, 9.0, 12.0, 12.0], [0.0, 0.0, 5.0, 4.0]], device=device)
    encoded = paste_masks_rle(torch.ones(3, 28, 28, device=device), boxes, (4, 5))
    assert encoded == [
        {"size": [4, 5], "counts": b"52207"},
        {"size": [4, 5], "counts": b"d0"},
        {"size": [4, 5], "counts": b"0d0"},
    ]


# Groups of five bits as numbers, before 48 is added. 32 is added if another group follows.
@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([0], [0]),
        ([15], [15]),
        ([16], [16 + 32, 0]),
        ([31], [31 + 32, 0]),
        ([1024], [32, 32, 1]),
        ([5, 33, 5, 32], [5, 1 + 32, 1, 5, 31]),
        ([0, 17, 3, 1], [0, 17 + 32, 0, 3, 16]),
        ([0, 18, 3, 1], [0, 18 + 32, 0, 3, 15 + 32, 31]),
    ],
)
def test_lengths_of_one_and_more_groups(lengths: list[int], groups: list[int]) -> None:
    assert [byte - 48 for byte in compress(lengths)] == groups


def assert_equals_pasting(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float
) -> None:
    pasted = paste_masks(masks, boxes, image_size, threshold)
    encoded = paste_masks_rle(masks, boxes, image_size, threshold)
    assert len(encoded) == len(masks)
    for mask, rle in zip(pasted, encoded, strict=True):
        assert rle["size"] == list(image_size)
        assert torch.equal(decode(rle), mask.cpu())


COORDINATE = st.one_of(st.floats(-20, 40, width=32), st.sampled_from([NAN, INF, -INF, 1e30, -1e30, 0.0, 7.0]))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[COORDINATE] * 4),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 19), st.integers(1, 19)),
    st.sampled_from([0.5, 0.3, 0.0, 0.9]),
    st.integers(0, 10**6),
)
def test_any_box(
    box: tuple[float, ...],
    mask_size: tuple[int, int],
    image_size: tuple[int, int],
    threshold: float,
    seed: int,
) -> None:
    masks, boxes = torch.rand(1, *mask_size, generator=generator(seed)), torch.tensor([box])
    assert_equals_pasting(masks, boxes, image_size, threshold)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 300), st.tuples(st.integers(1, 60), st.integers(1, 60)), st.integers(0, 10**6))
def test_any_number_of_instances(count: int, image_size: tuple[int, int], seed: int) -> None:
    masks, boxes = random_masks(count, 14, 9, seed), random_boxes(count, image_size, seed)
    assert_equals_pasting(masks, boxes, image_size, 0.5)


def test_a_mask_that_touches_all_borders_and_a_noise_mask(device: torch.device) -> None:
    masks = torch.stack([torch.ones(28, 28), torch.rand(28, 28, generator=generator(1))])
    boxes = torch.tensor([[-3.0, -4.0, 53.0, 47.0], [-3.0, -4.0, 53.0, 47.0]])
    assert_equals_pasting(masks.to(device), boxes.to(device), (43, 50), 0.5)


def test_pycocotools_reads_and_writes_the_same_bytes(device: torch.device) -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    masks, boxes = random_masks(30, 28, 28, 3).to(device), random_boxes(30, (480, 640), 3).to(device)
    encoded = paste_masks_rle(masks, boxes, (480, 640))
    pasted = paste_masks(masks, boxes, (480, 640)).permute(1, 2, 0).cpu().numpy()
    assert np.array_equal(coco.decode(encoded), pasted)
    assert encoded == coco.encode(np.asfortranarray(pasted.astype(np.uint8)))


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(paste_masks_rle) == inspect.signature(reference.paste_masks_rle)


MASKS = torch.zeros(4, 28, 28)
BOXES = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("masks", [[1.0]], TypeError),
        ("masks", MASKS.long(), TypeError),
        ("masks", MASKS[0], ValueError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", BOXES[:3], ValueError),
        ("image_size", 64, TypeError),
        ("image_size", (64, -1), ValueError),
        ("threshold", "0.5", TypeError),
        ("threshold", NAN, ValueError),
        ("threshold", -1.0, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"masks": MASKS, "boxes": BOXES, "image_size": (64, 64), argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        paste_masks_rle(**arguments)
