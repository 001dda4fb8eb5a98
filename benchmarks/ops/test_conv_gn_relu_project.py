"""conv_gn_relu_project in the last stage of the semantic head on P3, with its predictor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import conv_gn_relu_project

from ..harness import peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row, nbytes
from ..harness.measuring import bfloat16_problem
from .test_conv_gn_relu_upsample import close, small_conv_stage
from .test_group_norm_relu_upsample import NHWC


def _arguments(dtype: torch.dtype) -> Arguments:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 100, 168, generator=random)
    conv_weight = torch.randn(128, 256, 3, 3, generator=random) / 48
    gn_weight, gn_bias = torch.randn(2, 128, generator=random).to(dtype)
    weight, bias = torch.randn(54, 128, generator=random) / 11, torch.randn(54, generator=random)
    maps = [tensor.to(dtype).contiguous(memory_format=NHWC) for tensor in (x, conv_weight)]
    return *maps, gn_weight, gn_bias, 32, weight.to(dtype), bias.to(dtype)


def _eager(
    x: Tensor,
    conv_weight: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    x = F.relu(F.group_norm(F.conv2d(x, conv_weight, padding=1), num_groups, gn_weight, gn_bias))
    return F.conv2d(x, weight[:, :, None, None], bias)


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    conv_weight, weight = arguments[1], arguments[5]
    pixels = output.shape[0] * output.shape[2] * output.shape[3]
    flops = 2 * pixels * (conv_weight.numel() + weight.numel())
    return Cost(bytes=nbytes(arguments) + nbytes(output), flops=flops)


# Where bfloat16 is emulated, the convolution dominates the time of that case.
_EMULATED = not torch.cuda.is_available() and bfloat16_problem(torch.device("cpu")) is not None

COMPARISON = Comparison(
    op="conv_gn_relu_project",
    ours=conv_gn_relu_project,
    peers=[
        Peer("eager", _eager),
        Peer("torch.compile", peers.compiled(_eager), peers.compile_problem, full=True),
    ],
    cases=[
        Case("256 to 128 to 54 x 100 x 168, float32", partial(_arguments, torch.float32)),
        Case("256 to 128 to 54 x 100 x 168, bfloat16", partial(_arguments, torch.bfloat16), full=_EMULATED),
    ],
    agree=close,
    cost=_cost,
)


def _small_stage_and_predictor() -> tuple[Tensor, ...]:
    return *small_conv_stage(), random_normal(54, 64, seed=5) / 8, 0.1 * random_normal(54, seed=6)


ACCURACY = forward_and_gradient(
    "conv_gn_relu_project",
    _small_stage_and_predictor,
    lambda x, conv, gn_weight, gn_bias, *rest: conv_gn_relu_project(x, conv, gn_weight, gn_bias, 32, *rest),
    lambda x, conv, gn_weight, gn_bias, *rest: _eager(x, conv, gn_weight, gn_bias, 32, *rest),
)


@COMPARISON.rows()
def test_conv_gn_relu_project(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
