"""multiscale_roi_align on P2 to P5 for the box head's 1000 proposals and the mask head's 100 detections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from panfpn_fast.ops import multiscale_roi_align, reference

from ..harness import inputs, peers
from ..harness.agreement import close_features
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row
from ..harness.gradients import close_gradients, forward_backward
from ..harness.roi_cost import pooling_cost, training_cost

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _arguments(
    count: int,
    output_size: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
    *,
    image: tuple[int, int] = inputs.IMAGE,
    padded: tuple[int, int] = inputs.PADDED,
    aligned: bool = True,
) -> Arguments:
    features = inputs.pyramid(padded, dtype=dtype, memory_format=layout)
    return features, [inputs.boxes(count, image)], output_size, inputs.PYRAMID_SCALES, 0, aligned


def _few_boxes(arguments: Arguments) -> Arguments:
    features, boxes, *rest = arguments
    return features, [boxes[0][:32]], *rest


def _cost(arguments: Arguments, output: Tensor) -> Cost:
    features, (boxes,), _, scales, sampling_ratio, _ = arguments
    return pooling_cost(features, boxes, scales, output, sampling_ratio)


def _training_cost(arguments: Arguments, gradients: tuple[Tensor, ...]) -> Cost:
    features, (boxes,), side, scales, sampling_ratio, _ = arguments
    return training_cost(features, boxes, scales, side, sampling_ratio)


def _cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    large = partial(_arguments, image=inputs.LARGE, padded=inputs.LARGE)
    return [
        Case("1000 x 7 x 7, NCHW", partial(_arguments, 1000, 7, fp32, NCHW)),
        Case("1000 x 7 x 7, channels-last", partial(_arguments, 1000, 7, fp32, NHWC), highlight=True),
        Case("1000 x 7 x 7, channels-last bf16", partial(_arguments, 1000, 7, bf16, NHWC)),
        Case("100 x 14 x 14, channels-last", partial(_arguments, 100, 14, fp32, NHWC)),
        Case("300 x 14 x 14 of 2048 x 4096, channels-last", partial(large, 300, 14, fp32, NHWC), full=True),
    ]


REFERENCE = Peer("reference", reference.multiscale_roi_align, sample=_few_boxes)

COMPARISON = Comparison(
    op="multiscale_roi_align",
    ours=multiscale_roi_align,
    peers=[
        Peer("detectron2", peers.in_float32(peers.detectron2_pooler), peers.torchvision_problem),
        REFERENCE,
    ],
    cases=_cases(),
    agree=close_features,
    cost=_cost,
)

# torchvision's module supports only unaligned boxes.
UNALIGNED = Comparison(
    op="multiscale_roi_align, unaligned",
    ours=multiscale_roi_align,
    peers=[
        Peer("torchvision", peers.torchvision_multiscale(inputs.PADDED), peers.torchvision_problem),
        REFERENCE,
    ],
    cases=[Case("1000 x 7 x 7, NCHW", partial(_arguments, 1000, 7, torch.float32, NCHW, aligned=False))],
    agree=close_features,
    cost=_cost,
)

TRAINING = Comparison(
    op="multiscale_roi_align, forward and backward",
    ours=forward_backward(multiscale_roi_align),
    peers=[
        Peer("detectron2", forward_backward(peers.detectron2_pooler), peers.torchvision_problem),
        Peer("reference", forward_backward(reference.multiscale_roi_align), sample=_few_boxes),
    ],
    cases=[
        Case(f"1000 x 7 x 7, {name}", partial(_arguments, 1000, 7, torch.float32, layout))
        for name, layout in (("NCHW", NCHW), ("channels-last", NHWC))
    ],
    agree=close_gradients,
    cost=_training_cost,
)


@COMPARISON.rows()
def test_multiscale_roi_align(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@UNALIGNED.rows()
def test_multiscale_roi_align_unaligned(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)


@TRAINING.rows()
def test_multiscale_roi_align_training(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
