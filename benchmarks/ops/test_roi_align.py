"""roi_align on P2 alone, for all proposals of an image and for the mask head's boxes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import reference, roi_align

from ..harness import inputs, peers
from ..harness.accuracy import forward_and_gradient, random_normal
from ..harness.agreement import close_features
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row
from ..harness.gradients import close_gradients, forward_backward
from ..harness.roi_cost import pooling_cost, training_cost


def _arguments(count: int, output_size: int, dtype: torch.dtype, layout: torch.memory_format) -> Arguments:
    p2 = inputs.pyramid(dtype=dtype, memory_format=layout)[0]
    return p2, [inputs.boxes(count)], output_size, inputs.PYRAMID_SCALES[0], 0, True


def _training_arguments(layout: torch.memory_format) -> Arguments:
    """Makes arguments with two samples along each side of a bin; with an adaptive grid the peer takes minutes."""
    p2, boxes, output_size, scale, _, aligned = _arguments(1000, 7, torch.float32, layout)
    return p2, boxes, output_size, scale, 2, aligned


def _few_boxes(arguments: Arguments) -> Arguments:
    features, boxes, *rest = arguments
    return features, [boxes[0][:32]], *rest


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    features, (boxes,), _, scale, sampling_ratio, _ = arguments
    return pooling_cost([features], boxes, [scale], output, sampling_ratio)


def _training_cost(arguments: Arguments, gradients: tuple[Tensor, ...]) -> Cost:
    features, (boxes,), side, scale, sampling_ratio, _ = arguments
    return training_cost([features], boxes, [scale], side, sampling_ratio)


def _torchvision(features: Tensor, boxes: Tensor | list[Tensor], *rest: object) -> Tensor:
    pooled: Tensor = peers.torchvision_ops().roi_align(features, boxes, *rest)
    return pooled


NCHW, NHWC = torch.contiguous_format, torch.channels_last

COMPARISON = Comparison(
    op="roi_align",
    ours=roi_align,
    peers=[
        Peer("torchvision", peers.in_float32(_torchvision), peers.torchvision_problem),
        Peer("reference", reference.roi_align, sample=_few_boxes),
    ],
    cases=[
        Case("100 x 7 x 7, NCHW", partial(_arguments, 100, 7, torch.float32, NCHW)),
        Case("1000 x 7 x 7, NCHW", partial(_arguments, 1000, 7, torch.float32, NCHW)),
        Case("1000 x 7 x 7, channels-last", partial(_arguments, 1000, 7, torch.float32, NHWC)),
        Case(
            "1000 x 7 x 7, channels-last bf16", partial(_arguments, 1000, 7, torch.bfloat16, NHWC), full=True
        ),
        Case("100 x 14 x 14, channels-last", partial(_arguments, 100, 14, torch.float32, NHWC), full=True),
    ],
    agree=close_features,
    cost=_cost,
)

TRAINING = Comparison(
    op="roi_align, forward and backward",
    ours=forward_backward(roi_align),
    peers=[
        Peer("torchvision", forward_backward(_torchvision), peers.torchvision_problem),
        Peer("reference", forward_backward(reference.roi_align), sample=_few_boxes),
    ],
    cases=[
        Case(f"1000 x 7 x 7, {name}", partial(_training_arguments, layout), highlight=layout == NCHW)
        for name, layout in (("NCHW", NCHW), ("channels-last", NHWC))
    ],
    agree=close_gradients,
    cost=_training_cost,
)


def _small_map() -> tuple[Tensor, Tensor]:
    rois = F.pad(inputs.boxes(200, (200, 336)), (1, 0)).double()
    return random_normal(1, 64, 50, 84), rois


ACCURACY = forward_and_gradient(
    "roi_align",
    _small_map,
    lambda features, rois: roi_align(features, rois, 7, 0.25, 2, True),
    lambda features, rois: _torchvision(features, rois, 7, 0.25, 2, True),
    peers.torchvision_problem,
)


@COMPARISON.rows()
def test_roi_align(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_roi_align_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
