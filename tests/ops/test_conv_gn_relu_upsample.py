from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import conv_gn_relu_upsample, group_norm_relu_upsample, reference
from support.op_checks import OPS, Sample, Tolerance, run_op_checks
from support.op_samples import generator, random_features


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Returns the tolerance for normalised values up to 4 and gradients that sum up to 2000 products of them."""
    if dtype == torch.float64:
        return Tolerance("Sums of up to 2000 terms in a different order.", 1e-10, 1e-10)
    if dtype == torch.float32:
        return Tolerance(
            "Convolutions that sum in a different order, with terms that largely cancel.", 2e-3, 1e-4
        )
    return Tolerance(
        "The gradients of the convolution are half-precision sums of terms that cancel.",
        16 * torch.finfo(dtype).eps,
        4 * torch.finfo(dtype).eps,
    )


def conv_weights(channels_out: int, channels_in: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(channels_out, channels_in, 3, 3, generator=generator(channels_in))
    return (weight / (3 * channels_in**0.5)).to(dtype)


def make_samples(dtype: torch.dtype, device: torch.device) -> list[Sample]:
    def sample(shape: tuple[int, ...], channels: int, groups: int, factor: int, wide: bool = False) -> Sample:
        x = random_features(shape, seed=shape[2]).to(dtype)
        parameters = torch.randn(2, channels, generator=generator(0)).to(torch.float32 if wide else dtype)
        args = (x, conv_weights(channels, shape[1], dtype), *parameters, groups, 1e-5, factor)
        return Sample(args, {}, tolerance(dtype)).map_tensors(lambda tensor: tensor.to(device))

    return [
        sample((2, 5, 13, 17), 12, 4, 2),
        sample((3, 16, 9, 7), 32, 8, 2, wide=True),
        sample((2, 3, 6, 11), 20, 5, 1),
        sample((0, 7, 5, 9), 6, 3, 2),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_checks(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is tested on the CPU only")
    run_op_checks(OPS["conv_gn_relu_upsample"], make_samples(dtype, device))


def test_reference_has_the_same_signature() -> None:
    assert inspect.signature(conv_gn_relu_upsample) == inspect.signature(reference.conv_gn_relu_upsample)


def test_reference_equals_torch() -> None:
    x, weight = random_features((2, 4, 6, 7), 0).double(), conv_weights(8, 4, torch.float64)
    gn_weight, gn_bias = torch.randn(2, 8, generator=generator(1), dtype=torch.float64)
    expected = F.relu(F.group_norm(F.conv2d(x, weight, padding=1), 2, gn_weight, gn_bias, 1e-3))
    expected = F.interpolate(expected, scale_factor=4.0, mode="bilinear")
    actual = reference.conv_gn_relu_upsample(x, weight, gn_weight, gn_bias, 2, 1e-3, 4)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_autocast_keeps_the_norm_in_float32(device: torch.device) -> None:
    x, weight = random_features((1, 8, 9, 11), 0).to(device), conv_weights(16, 8, torch.float32).to(device)
    gn_weight, gn_bias = torch.randn(2, 16, generator=generator(1)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = conv_gn_relu_upsample(x, weight, gn_weight, gn_bias, 4)
        y = F.conv2d(x, weight, padding=1)
    assert actual.dtype == torch.bfloat16
    expected = group_norm_relu_upsample(y, gn_weight, gn_bias, 4)
    # CUDA uses a different convolution, whose result is also rounded to bfloat16.
    allowed = 0.0 if device.type == "cpu" else 0.1
    torch.testing.assert_close(actual, expected, atol=allowed, rtol=allowed)


def test_training_under_autocast(device: torch.device) -> None:
    leaves = [
        random_features((1, 8, 9, 11), 0).to(device),
        conv_weights(16, 8, torch.float32).to(device),
        *torch.randn(2, 16, generator=generator(1)).to(device),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    x, weight, gn_weight, gn_bias = leaves
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = conv_gn_relu_upsample(x, weight, gn_weight, gn_bias, 4)
    grads = torch.autograd.grad(output.float().square().mean(), leaves)
    exact = reference.conv_gn_relu_upsample(x, weight, gn_weight, gn_bias, 4)
    expected = torch.autograd.grad(exact.square().mean(), leaves)
    for got, wanted in zip(grads, expected, strict=True):
        assert got.dtype == torch.float32
        # The map, the weights, the result of the convolution and its gradient are rounded to 8 significant bits.
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_layout_follows_the_convolution() -> None:
    x, weight = random_features((2, 8, 5, 7), 0), conv_weights(16, 8, torch.float32)
    gn = torch.ones(16), torch.zeros(16), 4
    assert conv_gn_relu_upsample(x, weight, *gn).is_contiguous()
    output = conv_gn_relu_upsample(x.contiguous(memory_format=torch.channels_last), weight, *gn)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_meta_tensors() -> None:
    x, weight = torch.zeros(2, 8, 5, 7, device="meta"), torch.zeros(16, 8, 3, 3, device="meta")
    gn_weight, gn_bias = torch.zeros(2, 16, device="meta")
    assert conv_gn_relu_upsample(x, weight, gn_weight, gn_bias, 4).shape == (2, 16, 10, 14)


X = torch.zeros(2, 8, 3, 5)
WEIGHT = torch.zeros(16, 8, 3, 3)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", None, TypeError),
        ("x", X.int(), TypeError),
        ("x", X[0], ValueError),
        ("conv_weight", None, TypeError),
        ("conv_weight", WEIGHT.double(), TypeError),
        ("conv_weight", WEIGHT.bfloat16(), TypeError),
        ("conv_weight", WEIGHT[:, :7], ValueError),
        ("conv_weight", WEIGHT[..., :1], ValueError),
        ("conv_weight", WEIGHT[..., 0], ValueError),
        ("gn_weight", torch.ones(8), ValueError),
        ("gn_weight", 1.0, TypeError),
        ("gn_bias", torch.ones(16).half(), TypeError),
        ("gn_bias", torch.ones(15), ValueError),
        ("num_groups", 3, ValueError),
        ("num_groups", None, TypeError),
        ("eps", -1.0, ValueError),
        ("scale_factor", -1, ValueError),
        ("scale_factor", "2", TypeError),
    ],
)
def test_bad_input_is_refused(argument: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {
        "x": X,
        "conv_weight": WEIGHT,
        "gn_weight": torch.ones(16),
        "gn_bias": torch.zeros(16),
        "num_groups": 4,
        argument: value,
    }
    with pytest.raises(error, match=rf"^{re.escape(argument)}\b"):
        conv_gn_relu_upsample(**arguments)
