from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import reference, upsample_cross_entropy
from support.op_checks import OPS, Sample, Tolerance, run_op_checks
from support.op_samples import generator, random_features
from support.resident_memory import peak_rise

IGNORED = 255


def random_target(logits: Tensor, scale_factor: int, seed: int, ignored: float = 0.2) -> Tensor:
    """Returns a target with patches of 3 x 3 pixels, single pixels and ignored pixels."""
    count, classes, height, width = logits.shape
    size = (count, height * scale_factor, width * scale_factor)
    random = generator(seed)
    patches = torch.randint(0, classes, size, generator=random)
    patches = patches[:, torch.arange(size[1]) // 3 * 3][:, :, torch.arange(size[2]) // 3 * 3]
    single = torch.randint(0, classes, size, generator=random)
    target = torch.where(torch.rand(size, generator=random) < 0.3, single, patches)
    return target.masked_fill(torch.rand(size, generator=random) < ignored, IGNORED)


def tolerance(dtype: torch.dtype, pixels: int) -> Tolerance:
    """Returns the tolerance for the loss (float32 for half precision) and for gradients divided by `pixels`."""
    if dtype == torch.float64:
        return Tolerance(
            "Sums of up to 64 terms of order ten in a different order.", 1e-12 / max(pixels, 1), 1e-12
        )
    summed = "Interpolations of logits of order ten, and sums over classes and pixels, in a different order."
    if dtype == torch.float32:
        return Tolerance(summed, 1e-5 / max(pixels, 1), 1e-5)
    # One step of the gradient's dtype, and one step of its subnormals.
    info = torch.finfo(dtype)
    return Tolerance(
        f"{summed} Rounding to {dtype}.", 1e-5 / max(pixels, 1) + info.smallest_normal * info.eps, info.eps
    )


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(shape: tuple[int, ...], scale_factor: int, **kwargs: Any) -> Sample:
        logits = (3 * random_features(shape, seed=len(shape))).to(dtype)
        ignore_index = kwargs.get("ignore_index", IGNORED)
        target = random_target(logits, scale_factor, seed=sum(shape))
        target[target == IGNORED] = ignore_index
        pixels = target.numel() if kwargs.get("reduction", "mean") == "mean" else 1
        made = Sample((logits, target, scale_factor), kwargs, tolerance(dtype, pixels))
        return made.map_tensors(lambda tensor: tensor.to(device))

    weight = torch.rand(7, generator=generator(0)) + 0.1
    return [
        sample((2, 19, 11, 13), 4),
        sample((1, 54, 5, 37), 3),
        sample((0, 3, 4, 5), 2, reduction="sum"),
        sample((2, 7, 9, 17), 2, weight=weight, label_smoothing=0.1, reduction="none"),
        sample((3, 7, 5, 6), 8, weight=weight, label_smoothing=0.1),
        sample((2, 7, 6, 21), 5, weight=weight, reduction="sum", ignore_index=3),
        sample((2, 7, 3, 35), 1, label_smoothing=1.0, reduction="sum"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["upsample_cross_entropy"], make_samples(dtype, device))


def loss_and_gradient(function: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf, *args, **kwargs)
    weights = torch.rand(loss.shape, generator=generator(0), dtype=torch.float64).to(loss)
    return loss.detach(), torch.autograd.grad(loss, leaf, weights)[0]


def torch_loss(
    logits: Tensor,
    target: Tensor,
    scale_factor: int,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Computes the loss with PyTorch in the dtype of the logits."""
    upsampled = F.interpolate(logits, scale_factor=scale_factor, mode="bilinear")
    return F.cross_entropy(
        upsampled,
        target.long(),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], relative: float) -> None:
    """Compares with a tolerance relative to the largest value; NaN must be at the same positions."""
    for got, wanted in zip(actual, expected, strict=True):
        finite = wanted[wanted.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        torch.testing.assert_close(got, wanted, atol=relative * scale, rtol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_torch(weighted: bool, label_smoothing: float, reduction: str, device: torch.device) -> None:
    # The expected value is computed on the CPU in float64, where rounding is negligible.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    weight = torch.rand(6, generator=generator(0)).to(device, dtype) if weighted else None
    settings: dict[str, Any] = {
        "weight": weight,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    shapes = [((1, 1), 2), ((1, 19), 3), ((7, 2), 4), ((4, 17), 1), ((18, 33), 6), ((19, 8), 4)]
    for seed, (size, scale_factor) in enumerate(shapes):
        logits = (4 * random_features((2, 6, *size), seed)).to(device, dtype)
        for ignored in (0.0, 0.3, 1.0):
            target = random_target(logits, scale_factor, seed, ignored).to(device)
            args = (logits, target, scale_factor)
            actual = loss_and_gradient(upsample_cross_entropy, *args, **settings)
            expected = loss_and_gradient(torch_loss, *args, **settings)
            assert_same(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_known_loss(device: torch.device) -> None:
    # One class leads by 2 at the left, the other by 2 at the right. In between, at a quarter and at three quarters of
    # the distance, the leads are 1.
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]], device=device)
    target = torch.tensor([[[0, 0, 0, IGNORED], [1, 1, IGNORED, 1]]], device=device)
    losses = upsample_cross_entropy(logits, target, 2, reduction="none")
    softplus = [math.log1p(math.exp(x)) for x in (-2, -1, 1, 2)]
    expected = [[softplus[0], softplus[1], softplus[2], 0.0], [softplus[3], softplus[2], 0.0, softplus[0]]]
    torch.testing.assert_close(losses, torch.tensor([expected], device=device))
    mean = upsample_cross_entropy(logits, target, 2)
    assert mean.item() == pytest.approx(sum(map(sum, expected)) / 6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pixel_counts(reduction: str, device: torch.device) -> None:
    logits = random_features((2, 5, 6, 20), 0).to(device)
    target = torch.full((2, 12, 40), IGNORED, device=device)
    loss, gradient = loss_and_gradient(upsample_cross_entropy, logits, target, 2, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_classes_without_weight(label_smoothing: float, device: torch.device) -> None:
    logits = random_features((1, 3, 5, 6), 0).to(device)
    target = torch.zeros(1, 10, 12, dtype=torch.int64, device=device)
    target[0, 0, 0] = IGNORED
    weight = torch.tensor([0.0, 1.0, 2.0], device=device)
    settings: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    assert upsample_cross_entropy(logits, target, 2, **settings).isnan()
    for reduction in ("mean", "sum"):
        args = (logits, target, 2)
        actual = loss_and_gradient(upsample_cross_entropy, *args, **settings, reduction=reduction)
        assert_same(actual, loss_and_gradient(torch_loss, *args, **settings, reduction=reduction), 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_factor", [2, 4])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_logits_that_are_not_finite(
    value: float, scale_factor: int, reduction: str, device: torch.device
) -> None:
    # In separate maps: a pixel in the middle, at a corner and at two borders. Half of the last map is ignored.
    logits = random_features((5, 4, 7, 40), 0)
    target = random_target(logits, scale_factor, 0)
    for image, (y, x) in enumerate([(3, 20), (0, 0), (6, 17), (2, 39), (3, 18)]):
        logits[image, 1, y, x] = value
    target[4, :, : 24 * scale_factor] = IGNORED
    args = (logits.to(device), target.to(device), scale_factor)
    for label_smoothing in (0.0, 0.1):
        settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
        actual = loss_and_gradient(upsample_cross_entropy, *args, **settings)
        expected = loss_and_gradient(torch_loss, *args, **settings)
        assert_same(actual, expected, 1e-5)


def test_class_that_is_switched_off(device: torch.device) -> None:
    # PyTorch multiplies minus infinity by zero only in the first row and column.
    logits = random_features((1, 4, 5, 20), 0).to(device)
    logits[:, 2] = -math.inf
    target = torch.zeros(1, 20, 80, dtype=torch.int64, device=device)
    losses = upsample_cross_entropy(logits, target, 4, reduction="none")
    assert_same((losses,), (torch_loss(logits, target, 4, reduction="none"),), 1e-5)
    assert losses[:, 2:, 2:].isfinite().all()
    assert losses[:, :2].isnan().all()


@pytest.mark.parametrize("step", [30.0, 300.0, 3e4])
def test_steep_logits(step: float, device: torch.device) -> None:
    # Halfway between two inputs with different confident classes, all logits are far below the maxima of both inputs.
    logits = random_features((2, 6, 5, 37), 0)
    leaders = torch.randint(0, 6, (2, 1, 5, 37), generator=generator(1))
    logits = logits.scatter_add(1, leaders, torch.full_like(leaders, step, dtype=torch.float32))
    logits = logits - step * torch.rand(2, 1, 5, 37, generator=generator(2))
    target = random_target(logits, 4, 0)
    actual = loss_and_gradient(
        upsample_cross_entropy, logits.to(device), target.to(device), 4, reduction="none"
    )
    expected = loss_and_gradient(torch_loss, logits.double(), target, 4, reduction="none")
    # Logits are rounded to float32 before exp(), and the error grows with their size.
    bound = 1e-6 + 4 * step * torch.finfo(torch.float32).eps
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, atol=bound, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ignore_index", [0, 3, 255, -1, -100, 2**40])
def test_dtypes_of_targets(dtype: torch.dtype, ignore_index: int, device: torch.device) -> None:
    logits = random_features((2, 5, 6, 19), 0).to(device)
    target = torch.randint(0, 5, (2, 12, 38), generator=generator(0))
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        target[:, 3:5] = ignore_index
    expected = torch_loss(logits, target.to(device), 2, ignore_index=ignore_index)
    actual = upsample_cross_entropy(logits, target.to(device, dtype), 2, ignore_index=ignore_index)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.uint8, 5),
        (torch.uint8, 254),
        (torch.int16, -1),
        (torch.int32, -(2**31)),
        (torch.int64, 2**32 + 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 11, 37), (1, 6, 20)])
def test_target_that_is_not_a_class(
    dtype: torch.dtype, value: int, place: tuple[int, int, int], device: torch.device
) -> None:
    logits = random_features((2, 5, 6, 19), 0).to(device)
    target = random_target(logits, 2, 0).to(device, dtype)
    if dtype == torch.int16:
        target[target == IGNORED] = 255
    target[place] = value
    for reduction in ("mean", "sum", "none"):
        if device.type == "cuda":
            loss = upsample_cross_entropy(logits, target, 2, reduction=reduction)
            assert (loss[place] if reduction == "none" else loss).isnan()
        else:
            message = re.escape(
                f"target: expected classes from 0 to 4 or ignore_index 255, got {value} at {list(place)}"
            )
            with pytest.raises(RuntimeError, match=message):
                upsample_cross_entropy(logits, target, 2, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    logits = (3 * random_features((2, 7, 9, 21), 0)).to(device, dtype)
    target = random_target(logits, 4, 0).to(device)
    loss, gradient = loss_and_gradient(upsample_cross_entropy, logits, target, 4)
    wide, wide_gradient = loss_and_gradient(upsample_cross_entropy, logits.float(), target, 4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wide.item(), rel=1e-6)
    assert torch.equal(gradient, wide_gradient.to(dtype))


def test_weight_may_have_another_dtype(device: torch.device) -> None:
    logits = random_features((1, 4, 5, 6), 0).to(device)
    target = random_target(logits, 2, 0).to(device)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25], device=device)
    losses = [
        upsample_cross_entropy(logits, target, 2, weight=weight.to(dtype))
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ]
    assert len({loss.item() for loss in losses}) == 1


def test_gradient_follows_the_layout_of_the_logits(device: torch.device) -> None:
    logits = random_features((2, 19, 9, 21), 0).to(device)
    target = random_target(logits, 4, 0).to(device)
    plain = loss_and_gradient(upsample_cross_entropy, logits, target, 4)
    last = loss_and_gradient(
        upsample_cross_entropy, logits.contiguous(memory_format=torch.channels_last), target, 4
    )
    assert plain[1].is_contiguous()
    assert last[1].is_contiguous(memory_format=torch.channels_last)
    assert_same(last, plain, 1e-6)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    logits = random_features((2, 19, 45, 33), 0)
    target = random_target(logits, 4, 0)
    weight = torch.rand(19, generator=generator(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                loss_and_gradient(
                    upsample_cross_entropy, logits, target, 4, weight=weight, label_smoothing=0.1
                )
            )
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_large_factor(device: torch.device) -> None:
    logits = random_features((1, 3, 2, 3), 0).to(device)
    target = random_target(logits, 150, 0).to(device)
    actual = loss_and_gradient(upsample_cross_entropy, logits, target, 150)
    # Each gradient is a sum of 40,000 terms of both signs.
    assert_same(actual, loss_and_gradient(torch_loss, logits, target, 150), 1e-4)


def test_upsampled_logits_are_never_in_memory() -> None:
    # PyTorch holds the softmax, its gradient and the gradient of the upsampled logits at the same time.
    logits = random_features((1, 54, 100, 100), 0).contiguous(memory_format=torch.channels_last)
    target = random_target(logits, 4, 0).to(torch.uint8)
    eager = 3 * 54 * 400 * 400 * 4
    loss_and_gradient(upsample_cross_entropy, logits[:, :, :8, :8], target[:, :32, :32], 4)
    assert peak_rise(lambda: loss_and_gradient(upsample_cross_entropy, logits, target, 4)) < eager / 10


def test_no_second_derivative(device: torch.device) -> None:
    logits = random_features((1, 3, 4, 4), 0).to(device).requires_grad_()
    target = random_target(logits, 2, 0).to(device)
    (gradient,) = torch.autograd.grad(upsample_cross_entropy(logits, target, 2), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(upsample_cross_entropy) == inspect.signature(reference.upsample_cross_entropy)


LOGITS = torch.zeros(2, 3, 4, 5)
TARGET = torch.zeros(2, 8, 10, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("logits", [[1.0]], TypeError),
        ("logits", LOGITS.long(), TypeError),
        ("logits", LOGITS[0], ValueError),
        ("logits", LOGITS[:, :0], ValueError),
        ("target", None, TypeError),
        ("target", TARGET.float(), TypeError),
        ("target", TARGET[0], ValueError),
        ("target", TARGET[:1], ValueError),
        ("target", TARGET[:, 1:], ValueError),
        ("target", TARGET.to("meta"), ValueError),
        ("scale_factor", 2.0, TypeError),
        ("scale_factor", 0, ValueError),
        ("scale_factor", 4096, ValueError),
        ("ignore_index", None, TypeError),
        ("weight", [1.0, 1.0, 1.0], TypeError),
        ("weight", torch.ones(3, dtype=torch.int64), TypeError),
        ("weight", torch.ones(4), ValueError),
        ("weight", torch.ones(3, 1), ValueError),
        ("label_smoothing", "0.1", TypeError),
        ("label_smoothing", -0.1, ValueError),
        ("label_smoothing", 1.5, ValueError),
        ("label_smoothing", math.nan, ValueError),
        ("reduction", "average", ValueError),
        ("reduction", None, ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "target": TARGET, "scale_factor": 2, argument: value}
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        upsample_cross_entropy(**arguments)
