from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from panfpn_fast.ops import conv3x3, conv_gn_relu_upsample, reference, winograd
from panfpn_fast.ops._winograd import _DTYPES, _VECTORS, _dtypes
from support.op_checks import OPS, Sample, Tolerance, channels_last, run_op_checks
from support.op_samples import random_features

needs_vectors = pytest.mark.skipif(not _VECTORS, reason="Winograd's algorithm needs AVX2")


def tolerance(dtype: torch.dtype) -> Tolerance:
    if dtype == torch.float64:
        return Tolerance("A few hundred float64 rounding errors of values up to 10.", 1e-12, 1e-12)
    if dtype == torch.float32:
        return Tolerance(
            "Terms in a different order. The transforms of 4x4 tiles add rounding errors of values of order 10, which "
            "the gradient of the weights sums over a thousand pixels.",
            3e-4,
            1e-5,
        )
    step = torch.finfo(dtype).eps
    return Tolerance("The convolution and the addition are rounded to the dtype.", 8 * step, 4 * step)


def arguments(
    shape: tuple[int, int, int, int], outputs: int, seed: int, *, full: bool = True, relu: bool = False
) -> dict[str, Any]:
    """Returns arguments whose results are of order one; with bias and residual if `full`."""
    batch, channels, height, width = shape
    return {
        "x": random_features(shape, seed),
        "weight": random_features((outputs, channels, 3, 3), seed + 1) / (9 * channels) ** 0.5,
        "bias": random_features((outputs,), seed + 2) if full else None,
        "relu": relu,
        "residual": random_features((batch, outputs, height, width), seed + 3) if full else None,
    }


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(shape: tuple[int, int, int, int], outputs: int, last: bool = False, **options: bool) -> Sample:
        kwargs = arguments(shape, outputs, shape[3], **options)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                value = value.to(device, dtype)
                kwargs[name] = channels_last(value) if last else value
        return Sample((), kwargs, tolerance(dtype))

    # The reference rounds before it adds the residual, our op once after it. In 16-bit dtypes, ReLU would let different
    # gradients pass near zero.
    passes_the_same = dtype in (torch.float32, torch.float64)
    # With torch.compile, each combination of options needs one graph for each algorithm and layout.
    return [
        sample((2, 5, 6, 11), 12, relu=True),
        sample((0, 16, 7, 10), 32),
        # Large enough for Winograd's algorithm with tiles of 2x2 and of 4x4, with all kinds of channel counts.
        sample((1, 16, 17, 20), 32, full=False),
        sample((2, 17, 23, 25), 40),
        sample((1, 48, 31, 37), 16, last=True, relu=passes_the_same),
        sample((3, 24, 22, 19), 50, last=True, full=False, relu=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["conv3x3"], make_samples(dtype, device))


def test_by_hand(device: torch.device) -> None:
    # Each output is the sum of its neighbourhood: 4, 6 and 9 ones at a corner, an edge and inside.
    x, weight = torch.ones(1, 1, 3, 4, device=device), torch.ones(1, 1, 3, 3, device=device)
    rows = [[4.0, 6.0, 6.0, 4.0], [6.0, 9.0, 9.0, 6.0], [4.0, 6.0, 6.0, 4.0]]
    assert conv3x3(x, weight)[0, 0].tolist() == rows
    bias, residual = torch.full((1,), -7.0, device=device), torch.full_like(x, 0.5)
    expected = [[max(value - 6.5, 0) for value in row] for row in rows]
    assert conv3x3(x, weight, bias, True, residual)[0, 0].tolist() == expected


SHAPES = [
    (2, 16, 1, 1, 16),
    (1, 16, 1, 9, 32),
    (1, 32, 2, 2, 48),
    (1, 3, 7, 13, 5),
    (3, 48, 17, 33, 40),
    (5, 23, 14, 14, 17),
    (2, 64, 10, 35, 144),
    (0, 16, 4, 4, 16),
]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_the_definition(shape: tuple[int, int, int, int, int], tile: int) -> None:
    batch, channels, height, width, outputs = shape
    kwargs = arguments((batch, channels, height, width), outputs, seed=height + width)
    x, weight, bias, residual = (kwargs[name] for name in ("x", "weight", "bias", "residual"))
    prepared = torch.ops.panfpn_fast.conv3x3_prepare(weight, tile)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found: dict[tuple[bool, bool], Tensor] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for shift, added, relu in ((None, None, False), (bias, None, True), (bias, residual, True)):
            expected = exact if shift is None else exact + shift[:, None, None].double()
            expected = expected if added is None else expected + added
            expected = expected.relu() if relu else expected
            # The layout of the residual must not matter.
            output = torch.ops.panfpn_fast.conv3x3_prepared(
                x.contiguous(memory_format=layout), prepared, outputs, shift, relu, added
            )
            assert output.shape == (batch, outputs, height, width)
            if output.numel():
                assert output.is_contiguous(memory_format=layout)
                # Rounding errors of sums of order one; those of 4x4 tiles are about three times as large.
                torch.testing.assert_close(
                    output, expected.float(), atol=5e-6 if tile == 2 else 2e-5, rtol=1e-6
                )
            same = found.setdefault((shift is None, added is None), output)
            assert torch.equal(output, same)


@pytest.mark.parametrize(("tile", "bound"), [(2, 4e-7), (4, 1.2e-6)])
def test_rounding_error_is_small(tile: int, bound: float) -> None:
    """The bounds are one and a half times the measured root mean square errors of results of order one.

    On the same input, the error of oneDNN's convolution is 2e-7 for NCHW and 8e-7 for channels-last. With the points
    0, 1, -1, 2, -2, or in one long sum over the channels, 4x4 tiles would exceed the bound.
    """
    kwargs = arguments((1, 256, 26, 34), 64, seed=0, full=False)
    exact = F.conv2d(kwargs["x"].double(), kwargs["weight"].double(), padding=1)
    prepared = torch.ops.panfpn_fast.conv3x3_prepare(kwargs["weight"], tile)
    output = torch.ops.panfpn_fast.conv3x3_prepared(kwargs["x"], prepared, 64, None, False, None)
    assert float((output - exact).square().mean().sqrt()) <= bound


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_types_are_rounded_once(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """The result is that of the same numbers in float32, rounded: whatever the layout and the number of channels."""
    batch, channels, height, width, outputs = shape
    given = arguments((batch, channels, height, width), outputs, seed=height + width)
    x, weight, bias, residual = (given[name].to(dtype) for name in ("x", "weight", "bias", "residual"))
    prepared = torch.ops.panfpn_fast.conv3x3_prepare(weight, 4)
    assert torch.equal(prepared, torch.ops.panfpn_fast.conv3x3_prepare(weight.float(), 4))

    def convolve(*maps: Tensor) -> Tensor:
        x, bias, residual = (one.contiguous(memory_format=layout) if one.dim() == 4 else one for one in maps)
        output: Tensor = torch.ops.panfpn_fast.conv3x3_prepared(x, prepared, outputs, bias, True, residual)
        return output

    found = convolve(x, bias, residual)
    assert found.dtype == dtype
    assert torch.equal(found, convolve(x.float(), bias.float(), residual.float()).to(dtype))


@needs_vectors
def test_prepared_weights_give_the_same_result() -> None:
    kwargs = arguments((1, 32, 32, 40), 48, seed=3, relu=True)
    prepared = winograd.prepare(kwargs["weight"])
    assert prepared is not None
    assert prepared.shape == (36, 32, 48)
    assert torch.equal(conv3x3(**kwargs, prepared=prepared), conv3x3(**kwargs))


@needs_vectors
def test_gradients_are_those_of_the_weights_themselves() -> None:
    kwargs = arguments((1, 32, 32, 40), 48, seed=3, relu=True)
    prepared = winograd.prepare(kwargs["weight"] + 1)  # other weights, which must not be used
    names = ("x", "weight", "bias", "residual")

    def gradients(**options: Any) -> tuple[Tensor, ...]:
        given = {name: kwargs[name].clone().requires_grad_() for name in names}
        output = conv3x3(**given, relu=True, **options)
        return (output, *torch.autograd.grad(output.square().sum(), list(given.values())))

    for found, expected in zip(gradients(prepared=prepared), gradients(), strict=True):
        assert torch.equal(found, expected)


@needs_vectors
def test_prepared_weights_choose_the_tile() -> None:
    kwargs = arguments((1, 32, 32, 40), 48, seed=3)
    found = conv3x3(**kwargs, prepared=winograd.prepare(kwargs["weight"], tile=2))
    assert not torch.equal(found, conv3x3(**kwargs))  # with tiles of 4x4
    torch.testing.assert_close(found, reference.conv3x3(**kwargs), atol=5e-6, rtol=1e-6)


def test_meta_tensors() -> None:
    kwargs: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in arguments((2, 16, 20, 21), 32, seed=1, relu=True).items()
    }
    output = conv3x3(**kwargs)
    assert output.device.type == "meta"
    assert output.shape == (2, 32, 20, 21)


def test_bfloat16_under_autocast() -> None:
    """Autocast converts the weights and the residual, which may have other dtypes than `x`."""
    kwargs = arguments((1, 16, 20, 21), 32, seed=1, relu=True)
    expected = reference.conv3x3(**kwargs)
    kwargs["residual"] = kwargs["residual"].to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv3x3(**kwargs)
        with pytest.raises(TypeError, match=r"^weight\b"):
            conv3x3(kwargs["x"], kwargs["weight"].double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)


@needs_vectors
def test_weights_that_torch_convolves_are_not_prepared() -> None:
    assert winograd.prepare(torch.zeros(16, 8, 3, 3)) is None
    assert winograd.prepare(torch.zeros(16, 16, 3, 3, dtype=torch.float64)) is None
    assert winograd.prepare(torch.zeros(16, 16, 3, 3, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_units_convolve_their_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_is_amx_tile_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported"
    monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    assert dtype not in _dtypes()
    monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert dtype in _dtypes()
    monkeypatch.delattr(torch.cpu, name)
    assert dtype in _dtypes()


@pytest.mark.parametrize("relu", [False, True])
def test_prepare_and_prepared_pass_opcheck(relu: bool) -> None:
    kwargs = arguments((1, 16, 5, 6), 24, seed=1)
    torch.library.opcheck(torch.ops.panfpn_fast.conv3x3_prepare.default, (kwargs["weight"], 4))
    prepared = torch.ops.panfpn_fast.conv3x3_prepare(kwargs["weight"], 4)
    given = (kwargs["x"], prepared, 24, kwargs["bias"], relu, kwargs["residual"])
    torch.library.opcheck(torch.ops.panfpn_fast.conv3x3_prepared.default, given)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 64, 37, 70, 48), (70, 16, 9, 9, 16)], ids=str)
def test_weight_gradient(shape: tuple[int, int, int, int, int], layout: torch.memory_format) -> None:
    batch, channels, height, width, outputs = shape
    x = random_features((batch, channels, height, width), seed=height).contiguous(memory_format=layout)
    grad = random_features((batch, outputs, height, width), seed=width)  # in another layout
    found = torch.ops.panfpn_fast.conv3x3_weight_gradient(grad, x)
    weight = torch.zeros(outputs, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(F.conv2d(x.double(), weight, padding=1), weight, grad.double())
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Rounding errors of sums of products of order one: the sums are of the order of the root of the pixels.
    scale = max(1, batch * height * width) ** 0.5
    torch.testing.assert_close(found, expected.float(), atol=1e-5 * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "op"), [(1024, "conv3x3_weight_gradient"), (1008, "convolution_backward")]
)
@needs_vectors
def test_weight_gradients_of_few_pixels_are_torchs(pixels: int, op: str) -> None:
    x, weight = torch.ones(1, 16, pixels // 16, 16), torch.ones(16, 16, 3, 3, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        learnt = weight.detach().to(memory_format=memory_format).requires_grad_()
        output = conv3x3(x, learnt)
        with torch.profiler.profile() as profile:
            output.sum().backward()
        assert op in {event.key.split("::")[-1] for event in profile.key_averages()}
        assert learnt.grad is not None
        assert learnt.grad.is_contiguous(memory_format=memory_format)


def test_weight_gradient_passes_opcheck() -> None:
    x, grad = random_features((2, 16, 6, 7), 1), random_features((2, 24, 6, 7), 2)
    given = (grad.requires_grad_(), x.requires_grad_())
    torch.library.opcheck(torch.ops.panfpn_fast.conv3x3_weight_gradient.default, given)


@pytest.mark.parametrize(
    ("grad", "x", "message"),
    [
        (torch.zeros(1, 16, 4, 5), torch.zeros(1, 16, 4, 4), "grad must be"),
        (torch.zeros(2, 16, 4, 4), torch.zeros(1, 16, 4, 4), "grad must be"),
        (torch.zeros(16, 4, 4), torch.zeros(1, 16, 4, 4), "grad must be"),
        (torch.zeros(1, 16, 4, 4).double(), torch.zeros(1, 16, 4, 4), "must be float32"),
    ],
)
def test_weight_gradient_of_other_maps_is_refused(grad: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.panfpn_fast.conv3x3_weight_gradient(grad, x)


@pytest.mark.parametrize("size", [(17, 18), (32, 32)])
@pytest.mark.parametrize("of", ["x", "weight"])
def test_second_derivative(size: tuple[int, int], of: str) -> None:
    """The gradient of a gradient equals that of torch's convolution."""
    kwargs = arguments((1, 16, *size), 16, seed=1, relu=True)

    def second(function: Any) -> Tensor:
        x = kwargs["x"].clone().requires_grad_()
        weight = kwargs["weight"].clone().requires_grad_()
        output = function(**{**kwargs, "x": x, "weight": weight})
        first, other = (x, weight) if of == "x" else (weight, x)
        [grad] = torch.autograd.grad(output.square().sum(), first, create_graph=True)
        [found] = torch.autograd.grad(grad.square().sum(), other)
        return found

    expected = second(reference.conv3x3)
    # Sums of a few thousand terms of the order of the result.
    largest = float(expected.abs().max())
    torch.testing.assert_close(second(conv3x3), expected, atol=1e-5 * largest, rtol=1e-4)


def test_forward_mode_and_torch_func_get_the_derivatives_of_torch() -> None:
    kwargs = arguments((1, 16, 17, 18), 16, seed=1, relu=True)
    weight = kwargs.pop("weight")

    def tangent(function: Any) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, weight.flip(0))
            return forward_ad.unpack_dual(function(**kwargs, weight=dual)).tangent

    # Sums of some hundred terms of order one.
    torch.testing.assert_close(tangent(conv3x3), tangent(reference.conv3x3), atol=1e-4, rtol=1e-5)
    prepared = winograd.prepare(weight)
    found = tangent(lambda **given: conv3x3(**given, prepared=prepared))
    torch.testing.assert_close(found, tangent(reference.conv3x3), atol=1e-4, rtol=1e-5)

    def gradient(function: Any) -> Tensor:
        return torch.func.grad(lambda weight: function(**kwargs, weight=weight).square().sum())(weight)

    # Sums of a few thousand terms of order one to ten.
    torch.testing.assert_close(gradient(conv3x3), gradient(reference.conv3x3), atol=1e-2, rtol=1e-4)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    kwargs = arguments((2, 32, 40, 44), 96, seed=1, relu=True)
    weight = kwargs["weight"].requires_grad_()
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = conv3x3(**kwargs)
            outputs.append((output, *torch.autograd.grad(output.square().sum(), weight)))
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert all(map(torch.equal, other, outputs[0]))


def test_nan_reaches_all_outputs_that_depend_on_it() -> None:
    kwargs = arguments((1, 16, 40, 40), 16, seed=1, full=False, relu=True)
    kwargs["x"][0, 3, 20, 20] = float("nan")
    assert conv3x3(**kwargs)[0, :, 19:22, 19:22].isnan().all()


def calls(function: Any) -> set[str]:
    """Returns the names of the convolutions that a call runs."""
    with torch.profiler.profile() as profile:
        function()
    names = {event.key.split("::")[-1] for event in profile.key_averages()}
    return names & {"conv3x3", "conv3x3_prepared", "convolution"}


@needs_vectors
def test_winograd_is_used_where_it_is_faster() -> None:
    def of(x: Tensor, weight: Tensor, **options: Any) -> set[str]:
        return calls(lambda: conv3x3(x, weight, **options))

    x, weight = torch.ones(1, 16, 16, 16), torch.ones(16, 16, 3, 3)
    prepared = winograd.prepare(weight)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert of(x.contiguous(memory_format=layout), weight) == {"conv3x3"}
    for dtype in _DTYPES:
        assert of(x.to(dtype), weight.to(dtype)) == {"conv3x3"}
    assert of(x[:, :, :15], weight) == {"convolution"}
    assert of(x[:, :, :15], weight, prepared=prepared) == {"conv3x3_prepared"}
    assert of(x[:, :15], weight[:, :15]) == {"convolution"}
    assert of(x.double(), weight.double()) == {"convolution"}
    with torch.autocast("cpu", torch.bfloat16):
        assert of(x, weight, prepared=prepared) == {"convolution"}
    with winograd(False):
        assert of(x, weight, prepared=prepared) == {"convolution"}
        with winograd(True):
            assert of(x, weight) == {"conv3x3"}
    assert of(x, weight) == {"conv3x3"}


@needs_vectors
def test_one_switch_can_be_nested_and_reused() -> None:
    x, weight = torch.ones(1, 16, 16, 16), torch.ones(16, 16, 3, 3)

    def used() -> set[str]:
        return calls(lambda: conv3x3(x, weight))

    off = winograd(False)
    with off:
        with off, winograd(True):
            assert used() == {"conv3x3"}
        assert used() == {"convolution"}
    assert used() == {"conv3x3"}
    with pytest.raises(KeyError), off:
        raise KeyError
    assert used() == {"conv3x3"}


@needs_vectors
def test_compiled_functions_follow_the_switch() -> None:
    x, weight = torch.ones(1, 16, 16, 16), torch.ones(16, 16, 3, 3)
    compiled = torch.compile(conv3x3, fullgraph=True, backend="eager")
    assert calls(lambda: compiled(x, weight)) == {"conv3x3"}
    with winograd(False):
        assert calls(lambda: compiled(x, weight)) == {"convolution"}
    assert calls(lambda: compiled(x, weight)) == {"conv3x3"}


@needs_vectors
def test_the_semantic_head_uses_winograd() -> None:
    x, weight = torch.ones(1, 16, 32, 32), torch.ones(32, 16, 3, 3)

    def stage() -> None:
        conv_gn_relu_upsample(x, weight, torch.ones(32), torch.zeros(32), 4)

    assert calls(stage) == {"conv3x3"}
    with winograd(False):
        assert calls(stage) == {"convolution"}


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(conv3x3) == inspect.signature(reference.conv3x3)


GOOD = arguments((2, 16, 6, 8), 32, seed=1)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", [[1.0]], TypeError),
        ("x", GOOD["x"].long(), TypeError),
        ("x", GOOD["x"][0], ValueError),
        ("x", GOOD["x"][:, :, :0], ValueError),
        ("x", GOOD["x"][..., :0], ValueError),
        ("weight", GOOD["weight"].double(), TypeError),
        ("weight", GOOD["weight"][:, :3], ValueError),
        ("weight", GOOD["weight"][..., :1], ValueError),
        ("weight", GOOD["weight"].to("meta"), ValueError),
        ("bias", GOOD["bias"].double(), TypeError),
        ("bias", GOOD["bias"][:4], ValueError),
        ("bias", GOOD["bias"].to("meta"), ValueError),
        ("relu", 1, TypeError),
        ("residual", 1.0, TypeError),
        ("residual", GOOD["residual"].double(), TypeError),
        ("residual", GOOD["residual"][:1], ValueError),
        ("residual", GOOD["residual"].to("meta"), ValueError),
        ("prepared", 1.0, TypeError),
        ("prepared", torch.zeros(36, 16, 32, dtype=torch.float64), TypeError),
        ("prepared", torch.zeros(36, 16, 16), ValueError),
        ("prepared", torch.zeros(25, 16, 32), ValueError),
        ("prepared", torch.zeros(36, 16, 32, device="meta"), ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        conv3x3(**{**GOOD, argument: value})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0,), TypeError, "weight"),
        ((torch.zeros(16, 16, 1, 1),), ValueError, "weight"),
        ((torch.zeros(16, 16, 3, 3), 3), ValueError, "tile"),
        ((torch.zeros(16, 16, 3, 3), 4.0), TypeError, "tile"),
        ((torch.zeros(16, 16, 3, 3), "4"), TypeError, "tile"),
    ],
)
def test_bad_weights_are_not_prepared(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{message}\b"):
        winograd.prepare(*arguments)
    with pytest.raises(TypeError, match=r"^enabled"):
        winograd("off")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "prepared", "outputs", "message"),
    [
        (torch.zeros(1, 16, 4, 4), torch.zeros(36, 16, 16), 17, "room for 16 outputs"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(36, 16, 16), 0, "room for 16 outputs"),
        (torch.zeros(1, 16, 4, 4), torch.zeros(25, 16, 16), 16, "must come from"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(36, 16, 16), 16, "input must be"),
        (torch.zeros(1, 16, 4, 4).double(), torch.zeros(36, 16, 16), 16, "input must be float32"),
    ],
)
def test_input_that_would_read_out_of_bounds_is_rejected(
    x: Tensor, prepared: Tensor, outputs: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.panfpn_fast.conv3x3_prepared(x, prepared, outputs, None, False, None)
