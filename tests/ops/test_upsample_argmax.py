from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panfpn_fast.ops import reference, upsample_argmax
from panfpn_fast.ops.reference.upsample_argmax import resampled_logits
from support.op_checks import FLIP_MARGIN, OPS, Sample, Tolerance, run_op_checks
from support.op_samples import generator, random_features

INF, NAN = math.inf, math.nan


def undecided_pixels(resampled: Tensor) -> Tensor:
    """Returns the pixels whose two best classes differ by no more than rounding errors, [N, height, width]."""
    if resampled.numel() == 0 or resampled.shape[1] == 1:
        return torch.zeros(
            resampled.shape[0], *resampled.shape[2:], dtype=torch.bool, device=resampled.device
        )
    margin = 1e-12 if resampled.dtype == torch.float64 else FLIP_MARGIN
    best, second = resampled.topk(2, dim=1).values.unbind(1)
    return best - second < margin * best.abs().clamp(min=1)


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(shape: tuple[int, ...], scale_factor: int, **kwargs: Any) -> Sample:
        logits = random_features(shape, seed=shape[1]).to(dtype)
        resampled = resampled_logits(logits, scale_factor, kwargs.get("crop"), kwargs.get("size"))
        tolerance = Tolerance(
            "Rounding decides between classes with nearly equal logits. Logits up to 5 are rounded to 5e-7, which "
            "changes probabilities by as much. Coordinates up to 100 px are rounded to 8e-6 px.",
            absolute=1e-5,
            undecided=undecided_pixels(resampled).to(device),
        )
        return Sample((logits.to(device), scale_factor), kwargs, tolerance)

    return [
        sample((2, 54, 9, 13), 4),
        sample((1, 5, 7, 11), 3, crop=(19, 30)),
        sample((2, 19, 6, 10), 2, size=(31, 17)),
        sample((1, 21, 10, 7), 4, crop=(37, 25), size=(16, 53)),
        sample((1, 33, 23, 18), 4, crop=(90, 71), size=(5, 3), return_prob=True),
        sample((0, 3, 5, 7), 2),
        sample((1, 257, 3, 5), 4, return_prob=True),
        sample((1, 1, 1, 1), 5),
        sample((3, 16, 1, 6), 8, size=(3, 120)),
        sample((2, 4, 25, 19), 1, crop=(23, 18)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["upsample_argmax"], make_samples(dtype, device))


def test_known_answers(device: torch.device) -> None:
    # The difference of the two logits is 8 at the left and -8 at the right. With a scale factor of 4, the pixels are at
    # 0, 0, 1/8, 3/8, 5/8, 7/8, 1 and 1 of the distance between them.
    logits = torch.tensor([[8.0, 0.0], [0.0, 8.0]], device=device).reshape(1, 2, 1, 2)
    labels, probabilities = upsample_argmax(logits, 4, return_prob=True)
    assert labels.tolist() == [[[0, 0, 0, 0, 1, 1, 1, 1]] * 4]
    expected = torch.sigmoid(torch.tensor([8.0, 8.0, 6.0, 2.0, 2.0, 6.0, 8.0, 8.0]))
    assert torch.allclose(probabilities.cpu(), expected.expand(1, 4, 8), atol=1e-6)
    # The crop keeps the first six pixels, and each of the three output pixels is the mean of two of them.
    labels, probabilities = upsample_argmax(logits, 4, crop=(2, 6), size=(1, 3), return_prob=True)
    assert labels.tolist() == [[[0, 0, 1]]]
    expected = torch.sigmoid(torch.tensor([[[8.0, 4.0, 4.0]]]))
    assert torch.allclose(probabilities.cpu(), expected, atol=1e-6)


def test_without_resampling_equals_argmax(device: torch.device) -> None:
    logits = random_features((2, 300, 17, 23), 0).to(device)
    labels, probabilities = upsample_argmax(logits, 1, return_prob=True)
    assert labels.dtype == torch.int16
    assert torch.equal(labels.long(), logits.argmax(1))
    torch.testing.assert_close(probabilities, logits.softmax(1).amax(1), atol=1e-6, rtol=0)
    assert upsample_argmax(logits[:, :256], 1).dtype == torch.uint8
    assert upsample_argmax(logits[:, :256] - torch.arange(256, device=device)[:, None, None], 1).max() < 20
    assert upsample_argmax(logits[:, :256] + torch.arange(256, device=device)[:, None, None], 1).min() > 235


def test_first_of_equal_classes(device: torch.device) -> None:
    logits = torch.zeros(1, 40, 3, 5, device=device)
    assert upsample_argmax(logits).eq(0).all()
    logits[:, [7, 21, 23, 39]] = 1.5
    labels, probabilities = upsample_argmax(logits, return_prob=True)
    assert labels.eq(7).all()
    assert torch.allclose(probabilities, torch.tensor(1 / (4 + 36 * math.exp(-1.5)), device=device))


def test_nan_is_the_largest(device: torch.device) -> None:
    logits = random_features((1, 40, 9, 9), 0).to(device)
    logits[0, 3, 4, 4] = INF
    logits[0, 17, 4, 4] = NAN
    logits[0, 35, 4, 4:] = NAN
    labels, probabilities = upsample_argmax(logits, 2, return_prob=True)
    assert labels[0, 7:11, 7:11].eq(17).all()
    assert labels[0, 7:11, 11:].eq(35).all()
    assert probabilities.isnan().sum() == 4 * (18 - 7)
    # Pixels that do not read a NaN are unchanged.
    others = torch.where(logits.isnan(), 0.0, logits)
    others[0, 3, 4, 4] = 0
    far = torch.ones(18, 18, dtype=torch.bool, device=device)
    far[7:11, 7:] = False
    assert torch.equal(labels[0][far], upsample_argmax(others, 2)[0][far])


def test_a_class_of_minus_infinity_is_never_chosen(device: torch.device) -> None:
    logits = random_features((1, 6, 5, 7), 0).to(device)
    others = logits[:, [0, 1, 3, 4, 5]]
    logits[:, 2] = -INF
    for kwargs in ({}, {"crop": (18, 25)}, {"crop": (18, 25), "size": (31, 40)}, {"size": (9, 28)}):
        labels, probabilities = upsample_argmax(logits, 4, **kwargs, return_prob=True)
        without, expected = upsample_argmax(others, 4, **kwargs, return_prob=True)
        assert torch.equal(labels, without + (without >= 2))
        torch.testing.assert_close(probabilities, expected)
    everywhere = torch.full((1, 6, 5, 7), -INF, device=device)
    assert upsample_argmax(everywhere, 3).eq(0).all()


@pytest.mark.parametrize("seed", range(24))
def test_values_that_are_not_finite(seed: int, device: torch.device) -> None:
    random = generator(seed)
    shape = [int(torch.randint(1, most, (), generator=random)) for most in (3, 40, 12, 12)]
    logits = random_features(shape, seed)
    odd = torch.tensor([NAN, INF, -INF])[torch.randint(0, 3, shape, generator=random)]
    logits = torch.where(torch.rand(shape, generator=random) < 0.03, odd, logits).to(device)
    # With a power of two, the coordinates of the reference are exact and its zero weights are exactly zero.
    scale_factor = 2 ** int(torch.randint(0, 4, (), generator=random))
    labels, probabilities = upsample_argmax(logits, scale_factor, return_prob=True)
    expected, expected_probabilities = reference.upsample_argmax(logits, scale_factor, return_prob=True)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(probabilities, expected_probabilities, equal_nan=True)
    assert torch.equal(labels, upsample_argmax(logits, scale_factor))


def scene(classes: int, height: int, width: int, seed: int) -> Tensor:
    """Returns logits with patches of several pixels, so that neighbours mostly have the same class."""
    random = generator(seed)
    patches = 5 * torch.randn(1, classes, -(-height // 6), -(-width // 6), generator=random)
    patches = patches.repeat_interleave(6, 2).repeat_interleave(6, 3)[:, :, :height, :width]
    return patches + torch.randn(1, classes, height, width, generator=random)


@pytest.mark.parametrize(
    ("shape", "scale_factor", "crop", "size"),
    [
        # Wide enough for several strips and high enough for several bands.
        ((257, 30, 130), 2, None, None),
        ((54, 60, 90), 4, (238, 355), (127, 190)),
        ((54, 20, 30), 4, (80, 117), (410, 600)),
        ((3, 40, 50), 4, (160, 200), (160, 91)),
        ((20, 70, 90), 2, (140, 180), (7, 5)),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scenes(
    shape: tuple[int, int, int],
    scale_factor: int,
    crop: Sequence[int] | None,
    size: Sequence[int] | None,
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    logits = scene(*shape, seed=shape[0]).to(device)
    upsampled = F.interpolate(logits, scale_factor=scale_factor, mode="bilinear", align_corners=False)
    if crop is not None:
        upsampled = upsampled[..., : crop[0], : crop[1]]
    if size is not None:
        upsampled = F.interpolate(upsampled, size=tuple(size), mode="bilinear", align_corners=False)
    logits = logits.contiguous(memory_format=layout)
    labels = upsample_argmax(logits, scale_factor, crop=crop, size=size)
    undecided = undecided_pixels(upsampled)
    assert undecided.float().mean() < 1e-3
    assert torch.equal(labels[~undecided].long(), upsampled.argmax(1)[~undecided])
    # With probabilities every pixel is computed; without them, only pixels between inputs of different classes are.
    computed, _ = upsample_argmax(logits, scale_factor, crop=crop, size=size, return_prob=True)
    assert torch.equal(labels[~undecided], computed[~undecided])


def test_result_does_not_depend_on_layout_or_threads() -> None:
    logits = scene(54, 50, 70, 0)
    logits[0, 3, 20, 30] = NAN
    arguments: dict[str, Any] = {"crop": (190, 270), "size": (301, 222), "return_prob": True}
    labels, probabilities = upsample_argmax(logits, 4, **arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                again = upsample_argmax(logits.contiguous(memory_format=layout), 4, **arguments)
                assert torch.equal(again[0], labels)
                assert torch.equal(again[1].nan_to_num(2), probabilities.nan_to_num(2))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*(st.integers(1, most) for most in (2, 70, 20, 20))),
    st.integers(1, 6),
    st.booleans(),
    st.one_of(st.none(), st.tuples(st.integers(1, 60), st.integers(1, 60))),
    st.integers(0, 2**32 - 1),
)
def test_any_sizes(
    shape: tuple[int, ...], scale_factor: int, cropped: bool, size: tuple[int, int] | None, seed: int
) -> None:
    random = generator(seed)
    logits = torch.randn(shape, generator=random)
    crop = None
    if cropped:
        height, width = (
            int(torch.randint(1, side * scale_factor + 1, (), generator=random)) for side in shape[2:]
        )
        crop = (height, width)
    labels, probabilities = upsample_argmax(logits, scale_factor, crop=crop, size=size, return_prob=True)
    resampled = resampled_logits(logits, scale_factor, crop, size)
    decided = ~undecided_pixels(resampled)
    assert torch.equal(labels[decided].long(), resampled.argmax(1)[decided])
    torch.testing.assert_close(probabilities, resampled.softmax(1).amax(1), atol=1e-5, rtol=0)
    assert torch.equal(upsample_argmax(logits, scale_factor, crop=crop, size=size)[decided], labels[decided])


@pytest.mark.parametrize(("channels", "masked"), [(1, 0), (5, 0), (5, 2), (16, 15), (20, 3)])
def test_weights_that_add_up_to_more_than_one(channels: int, masked: int, device: torch.device) -> None:
    """The rounded weights of row 13 do, so that the lowest float, which masks classes, gets infinite there."""
    kept = torch.randn(1, channels - masked, 6, 2, generator=generator(0)).to(device)
    lowest = kept.new_full((1, masked, 6, 2), torch.finfo(torch.float32).min)
    arguments: dict[str, Any] = {"scale_factor": 6, "size": (23, 3)}
    labels, probabilities = upsample_argmax(torch.cat((kept, lowest), 1), **arguments, return_prob=True)
    resampled = resampled_logits(kept, 6, None, (23, 3))
    decided = ~undecided_pixels(resampled)
    assert torch.equal(labels[decided].long(), resampled.argmax(1)[decided])
    torch.testing.assert_close(probabilities, resampled.softmax(1).amax(1), atol=1e-5, rtol=0)
    assert torch.equal(upsample_argmax(torch.cat((kept, lowest), 1), **arguments)[decided], labels[decided])


def test_output_has_no_gradient(device: torch.device) -> None:
    logits = random_features((1, 3, 4, 4), 0).to(device).requires_grad_()
    labels, probabilities = upsample_argmax(logits, return_prob=True)
    assert not labels.requires_grad
    assert not probabilities.requires_grad


def test_maps_without_pixels(device: torch.device) -> None:
    assert upsample_argmax(torch.zeros(2, 3, 0, 5, device=device), 4).shape == (2, 0, 20)
    assert upsample_argmax(torch.zeros(2, 3, 5, 0, device=device), 4).shape == (2, 20, 0)
    with pytest.raises(ValueError, match=r"^logits\b"):
        upsample_argmax(torch.zeros(2, 3, 0, 5, device=device), 4, size=(4, 4))


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(upsample_argmax) == inspect.signature(reference.upsample_argmax)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("logits", [[1.0]], TypeError),
        ("logits", torch.zeros(1, 3, 4, 4).long(), TypeError),
        ("logits", torch.zeros(3, 4, 4), ValueError),
        ("logits", torch.zeros(1, 0, 4, 4), ValueError),
        ("logits", torch.zeros(1, 32768, 1, 1), ValueError),
        ("scale_factor", 2.0, TypeError),
        ("scale_factor", 0, ValueError),
        ("scale_factor", 2**40, ValueError),
        ("crop", 2.5, TypeError),
        ("crop", (17, 4), ValueError),
        ("crop", (4, 17), ValueError),
        ("crop", (0, 4), ValueError),
        ("crop", (1, 2, 3), ValueError),
        ("size", "12", TypeError),
        ("size", (4, 0), ValueError),
        ("size", (4, -1), ValueError),
        ("return_prob", 1, TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(1, 3, 4, 4), argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        upsample_argmax(**arguments)
