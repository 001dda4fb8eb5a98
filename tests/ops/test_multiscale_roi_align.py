from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from panfpn_fast.ops import multiscale_roi_align, reference, roi_align
from support.op_checks import OPS, Sample, averaging_tolerance, run_op_checks
from support.op_samples import DEGENERATE_BOXES, random_boxes, random_features, random_rois

SCALES = (0.25, 0.125, 0.0625, 0.03125)


def make_features(images: int, channels: int, size: tuple[int, int], levels: int = 4) -> list[Tensor]:
    """Returns the maps of a pyramid over an image of `size`; the finest level has scale 1/4."""
    shapes = [
        (images, channels, -(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)[:levels]
    ]
    return [random_features(shape, seed) for seed, shape in enumerate(shapes)]


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    tolerance = averaging_tolerance(dtype)

    def sample(
        features: list[Tensor], boxes: Any, output_size: Any, scales: Any = SCALES, **kwargs: Any
    ) -> Sample:
        args = ([level.to(dtype) for level in features], boxes, output_size, scales)
        return Sample(args, kwargs, tolerance).map_tensors(lambda tensor: tensor.to(device))

    # The canonical box is small, so boxes in an image of 200 px reach all four levels.
    small = {"canonical_box_size": 56}
    degenerate = torch.cat([torch.zeros(len(DEGENERATE_BOXES), 1), DEGENERATE_BOXES], dim=1)
    lists = [random_boxes(4, (100, 140), 3), torch.zeros(0, 4)]
    return [
        sample(make_features(2, 3, (216, 300)), random_rois(13, 2, (216, 300), 0), 6, **small),
        sample(make_features(3, 5, (90, 214)), random_rois(7, 3, (90, 214), 1), 3, **small),
        sample(make_features(2, 3, (150, 200)), torch.zeros(0, 5), 7, **small),
        sample(make_features(0, 3, (150, 200)), torch.zeros(0, 5), 7, **small),
        sample(make_features(2, 9, (100, 140)), lists, (5, 3), sampling_ratio=2, aligned=False, **small),
        sample(make_features(2, 3, (100, 140)), degenerate, 2, **small),
        sample(make_features(2, 3, (100, 140), levels=1), random_rois(6, 2, (100, 140), 5), 2, SCALES[:1]),
        sample(
            make_features(2, 3, (60, 68), levels=2), random_rois(6, 2, (60, 68), 6).double(), 2, SCALES[:2]
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["multiscale_roi_align"], make_samples(dtype, device))


def levels_of(boxes: Tensor, device: torch.device, **kwargs: Any) -> list[int]:
    """Returns the level (2..5) from which each box is pooled, by pooling maps of 1024 px filled with their level."""
    features = [
        torch.full((1, 1, 256 >> level, 256 >> level), level + 2.0, device=device) for level in range(4)
    ]
    pooled = multiscale_roi_align(features, [boxes.to(device)], 1, SCALES, **kwargs).flatten()
    return pooled.round().int().tolist()


def squares(*sides: float) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side] for side in sides])


def test_levels_change_at_powers_of_two_of_the_canonical_box(device: torch.device) -> None:
    sides = (1.0, 56.0, 111.99, 112.0, 223.99, 224.0, 447.99, 448.0, 1000.0)
    assert levels_of(squares(*sides), device) == [2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert levels_of(squares(*sides), device, canonical_level=3) == [2, 2, 2, 2, 2, 3, 3, 4, 5]
    assert levels_of(squares(55.9, 56.0), device, canonical_box_size=112) == [2, 3]


def test_level_depends_on_the_area(device: torch.device) -> None:
    assert levels_of(
        torch.tensor([[0.0, 0.0, 112.0 * 8, 112.0 / 8], [0.0, 0.0, 112.0 * 8, 13.9]]), device
    ) == [3, 2]


def test_epsilon_decides_just_below_a_level_boundary(device: torch.device) -> None:
    almost = squares(223.9999)
    assert levels_of(almost, device) == [3]
    assert levels_of(almost, device, level_epsilon=1e-5) == [4]


def test_boxes_without_area_belong_to_the_finest_level(device: torch.device) -> None:
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0], [9.0, 5.0, 5.0, 9.0]])
    assert levels_of(flat, device, sampling_ratio=2) == [2, 2]


def test_each_box_is_roi_aligned_on_its_level(device: torch.device) -> None:
    features = [level.to(device) for level in make_features(2, 4, (800, 900))]
    rois = torch.cat([torch.tensor([[0.0], [1.0], [0.0], [1.0]]), squares(60, 150, 300, 600) + 7], dim=1).to(
        device
    )
    pooled = multiscale_roi_align(features, rois, 5, SCALES)
    for level, (level_features, scale) in enumerate(zip(features, SCALES, strict=True)):
        alone = roi_align(level_features, rois[level : level + 1], 5, scale, 0, True)
        torch.testing.assert_close(pooled[level : level + 1], alone, rtol=0, atol=0)


def test_output_follows_the_layout_of_the_features(device: torch.device) -> None:
    boxes = random_rois(4, 2, (90, 90), 0).to(device)
    features = [level.to(device) for level in make_features(2, 6, (90, 90))]
    assert multiscale_roi_align(features, boxes, 3, SCALES).is_contiguous()
    channels_last = [level.contiguous(memory_format=torch.channels_last) for level in features]
    pooled = multiscale_roi_align(channels_last, boxes, 3, SCALES)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert not pooled.is_contiguous()
    mixed = [features[0], *channels_last[1:]]
    torch.testing.assert_close(multiscale_roi_align(mixed, boxes, 3, SCALES), pooled, rtol=1e-5, atol=1e-5)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(multiscale_roi_align) == inspect.signature(reference.multiscale_roi_align)


FEATURES = make_features(2, 3, (64, 64))
BOXES = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("features", [], ValueError),
        ("features", FEATURES[0], TypeError),
        ("features", [[1.0]] * 4, TypeError),
        ("features", [level.long() for level in FEATURES], TypeError),
        ("features", [level[0] for level in FEATURES], ValueError),
        ("features", [FEATURES[0], *(level[:, :2] for level in FEATURES[1:])], ValueError),
        ("features", [FEATURES[0], *(level[:1] for level in FEATURES[1:])], ValueError),
        ("features", [FEATURES[0], *(level.double() for level in FEATURES[1:])], TypeError),
        ("boxes", None, TypeError),
        ("boxes", BOXES.long(), TypeError),
        ("boxes", BOXES[:, :4], ValueError),
        ("boxes", [BOXES[:, :4]], ValueError),
        ("output_size", None, TypeError),
        ("output_size", (0, 7), ValueError),
        ("spatial_scales", SCALES[:3], ValueError),
        ("spatial_scales", 0.25, TypeError),
        ("spatial_scales", SCALES[::-1], ValueError),
        ("spatial_scales", (0.25, 0.125, 0.0625, 0.05), ValueError),
        ("spatial_scales", (0.25, 0.125, 0.0625, 0.015625), ValueError),
        ("spatial_scales", (0.25, 0.125, 0.0625, 0.0), ValueError),
        ("sampling_ratio", 1.5, TypeError),
        ("canonical_box_size", 0, ValueError),
        ("canonical_box_size", "224", TypeError),
        ("canonical_level", 4.5, TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "features": FEATURES,
        "boxes": BOXES,
        "output_size": 7,
        "spatial_scales": SCALES,
        argument: value,
    }
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        multiscale_roi_align(**arguments)
