from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from panfpn_fast.ops import conv_gn_relu_project, reference
from support.op_checks import OPS, Sample, Tolerance, channels_last, run_op_checks
from support.op_samples import random_features

# Size of the residual: that of the output, half of it, or no residual.
SAME, HALF, NONE = 1, 2, 0


def tolerance(dtype: torch.dtype) -> Tolerance:
    if dtype == torch.float64:
        return Tolerance(
            "A few hundred float64 rounding errors in values and gradients up to 100.", 1e-11, 1e-11
        )
    if dtype == torch.float32:
        return Tolerance("Sums of a few hundred terms up to 100 in a different order.", 2e-4, 2e-5)
    step = torch.finfo(dtype).eps
    return Tolerance(
        "The result is rounded once and so must agree to one step. Both implementations round the intermediate values "
        "of the gradients to the dtype, but at different places, and the terms are up to ten times the sum.",
        30 * step,
        4 * step,
    )


def arguments(
    shape: tuple[int, int, int, int], channels: int, groups: int, outputs: int, residual: int, seed: int
) -> dict[str, Any]:
    """Returns arguments of a stage whose outputs are of order one."""
    batch, inputs, height, width = shape
    added = None
    if residual != NONE:
        added = random_features((batch, outputs, height // residual, width // residual), seed + 5)
    return {
        "x": random_features(shape, seed),
        "conv_weight": random_features((channels, inputs, 3, 3), seed + 1) / (9 * inputs) ** 0.5,
        "gn_weight": 1 + random_features((channels,), seed + 2) / 4,
        "gn_bias": random_features((channels,), seed + 3) / 4,
        "num_groups": groups,
        "weight": random_features((outputs, channels), seed + 4) / channels**0.5,
        "bias": random_features((outputs,), seed + 6) if seed % 2 else None,
        "residual": added,
    }


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(*about: Any, exact_norm: bool = False, last: bool = False) -> Sample:
        shape, channels, groups, outputs, residual = about
        kwargs = arguments(shape, channels, groups, outputs, residual, seed=shape[1])
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                value = value.to(device, torch.float32 if exact_norm and name.startswith("gn") else dtype)
                kwargs[name] = channels_last(value) if last else value
        return Sample((), kwargs, tolerance(dtype))

    return [
        sample((2, 5, 6, 10), 12, 3, 7, HALF),
        sample((1, 3, 7, 13), 33, 11, 19, SAME),
        sample((2, 6, 4, 6), 20, 5, 54, HALF, exact_norm=dtype in (torch.float16, torch.bfloat16)),
        sample((1, 4, 5, 3), 8, 2, 1, NONE),
        sample((0, 5, 6, 10), 12, 3, 7, HALF),
        # Large enough, and with suitable channel counts, for the Winograd convolution.
        sample((1, 16, 32, 34), 32, 8, 18, HALF, last=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["conv_gn_relu_project"], make_samples(dtype, device))


def test_two_by_two_by_hand(device: torch.device) -> None:
    # The convolution copies its input. GroupNorm turns 1, 3, 5, 7 into -3, -1, 1, 3 over sqrt(5), and ReLU sets two
    # of them to zero. The predictor doubles the values and adds 10.
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0]], device=device).reshape(1, 1, 2, 2)
    conv_weight = F.pad(torch.ones(1, 1, 1, 1, device=device), (1, 1, 1, 1))
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    weight, bias = torch.full((1, 1), 2.0, device=device), torch.full((1,), 10.0, device=device)
    projected = conv_gn_relu_project(x, conv_weight, one, zero, 1, weight, bias, eps=1e-12)
    expected = torch.tensor([[10.0, 10.0], [10 + 2 / 5**0.5, 10 + 6 / 5**0.5]], device=device)
    torch.testing.assert_close(projected, expected.reshape(1, 1, 2, 2))


def test_half_size_residual_by_hand(device: torch.device) -> None:
    # The activations are zero, so the result is the residual: columns 0, 1, 2, 3 sample it at 0 (clamped), 0.25, 0.75
    # and 1.
    x = torch.zeros(1, 1, 2, 4, device=device)
    conv_weight, weight = torch.zeros(1, 1, 3, 3, device=device), torch.ones(3, 1, device=device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    residual = torch.tensor([[0.0, 4.0], [8.0, 0.0], [1.0, 1.0]], device=device).reshape(1, 3, 1, 2)
    projected = conv_gn_relu_project(x, conv_weight, one, zero, 1, weight, residual=residual)
    rows = [[0.0, 1.0, 3.0, 4.0], [8.0, 6.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert projected[0].tolist() == [[row, row] for row in rows]
    # A residual of the size of the output is added unchanged.
    residual = torch.arange(24.0, device=device).reshape(1, 3, 2, 4)
    assert torch.equal(
        conv_gn_relu_project(x, conv_weight, one, zero, 1, weight, residual=residual), residual
    )


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33, 54, 134, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_classes(outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    kwargs: dict[str, Any] = {
        name: value.to(device, dtype) if isinstance(value, torch.Tensor) else value
        for name, value in arguments((1, 4, 4, 26), 24, 4, outputs, HALF, seed=0).items()
    }
    close = tolerance(dtype)
    torch.testing.assert_close(
        conv_gn_relu_project(**kwargs),
        reference.conv_gn_relu_project(**kwargs),
        atol=close.absolute,
        rtol=close.relative,
    )


def test_nan_reaches_its_group_and_all_logits(device: torch.device) -> None:
    kwargs = arguments((2, 4, 6, 6), 8, 2, 5, NONE, seed=0)
    kwargs["x"][1, :, 2, 3] = float("nan")
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    projected = conv_gn_relu_project(**kwargs)
    assert projected[0].isfinite().all()
    assert projected[1].isnan().all()


def test_output_is_channels_last(device: torch.device) -> None:
    kwargs = arguments((2, 4, 6, 6), 8, 2, 5, SAME, seed=0)
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    for x in (kwargs["x"], channels_last(kwargs["x"])):
        assert conv_gn_relu_project(**{**kwargs, "x": x}).is_contiguous(memory_format=torch.channels_last)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    kwargs: dict[str, Any] = {
        name: channels_last(value).requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments((2, 16, 24, 30), 32, 8, 19, HALF, seed=1).items()
    }
    leaves = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output = conv_gn_relu_project(**kwargs)
            input_grad, *_ = torch.autograd.grad(output.square().sum(), leaves)
            outputs.append((output, input_grad))
    finally:
        torch.set_num_threads(threads)
    for output, input_grad in outputs[1:]:
        assert torch.equal(output, outputs[0][0])
        assert torch.equal(input_grad, outputs[0][1])


def test_a_second_derivative_is_refused() -> None:
    kwargs = arguments((1, 4, 4, 6), 8, 2, 3, NONE, seed=0)
    x = kwargs.pop("x").requires_grad_()
    [grad] = torch.autograd.grad(conv_gn_relu_project(x, **kwargs).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.sum(), x)


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(conv_gn_relu_project) == inspect.signature(reference.conv_gn_relu_project)


GOOD = arguments((2, 4, 6, 8), 8, 2, 5, HALF, seed=1)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", [[1.0]], TypeError),
        ("x", GOOD["x"].long(), TypeError),
        ("x", GOOD["x"][0], ValueError),
        ("conv_weight", GOOD["conv_weight"].double(), TypeError),
        ("conv_weight", GOOD["conv_weight"][:, :3], ValueError),
        ("conv_weight", GOOD["conv_weight"][..., :1], ValueError),
        ("gn_weight", GOOD["gn_weight"].bfloat16(), TypeError),
        ("gn_weight", GOOD["gn_weight"][:4], ValueError),
        ("gn_bias", None, TypeError),
        ("num_groups", 3, ValueError),
        ("num_groups", 2.0, TypeError),
        ("weight", GOOD["weight"].double(), TypeError),
        ("weight", GOOD["weight"][:, :4], ValueError),
        ("weight", GOOD["weight"][..., None, None], ValueError),
        ("weight", GOOD["weight"][:0], ValueError),
        ("bias", GOOD["bias"].double(), TypeError),
        ("bias", GOOD["bias"][:4], ValueError),
        ("eps", 0.0, ValueError),
        ("residual", 1.0, TypeError),
        ("residual", GOOD["residual"].double(), TypeError),
        ("residual", GOOD["residual"][0], ValueError),
        ("residual", GOOD["residual"][:1], ValueError),
        ("residual", GOOD["residual"][:, :4], ValueError),
        ("residual", GOOD["residual"][..., :2], ValueError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        conv_gn_relu_project(**{**GOOD, argument: value})
