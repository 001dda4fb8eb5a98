"""upsample_argmax to the size of the network's input and to the size of the photograph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.ops import upsample_argmax

from ..harness import inputs, peers
from ..harness.accuracy import AccuracyCase
from ..harness.agreement import same_labels
from ..harness.comparison import Arguments, Case, Comparison, Cost, Peer, Row
from .test_upsample_cross_entropy import small_logits

_FACTOR = 4

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _noise(layout: torch.memory_format) -> Arguments:
    """Makes the worst case: neighbouring logits are unrelated, so every pixel must be computed."""
    logits = torch.randn(inputs.semantic_logits().shape, generator=torch.Generator().manual_seed(0))
    return logits.contiguous(memory_format=layout), None, None


def _scene(
    layout: torch.memory_format,
    crop: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    return inputs.semantic_logits(dtype=dtype, memory_format=layout), crop, size


def _ours(logits: Tensor, crop: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    return upsample_argmax(logits, _FACTOR, crop=crop, size=size)


def _eager(logits: Tensor, crop: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Upsamples as detectron2 does: in the head, then after a crop again in `sem_seg_postprocess`."""
    upsampled = F.interpolate(logits, scale_factor=_FACTOR, mode="bilinear", align_corners=False)
    if crop is not None:
        upsampled = upsampled[..., : crop[0], : crop[1]]
    if size is not None:
        upsampled = F.interpolate(upsampled, size=size, mode="bilinear", align_corners=False)
    return upsampled.argmax(1)


def _eager_in_float32(logits: Tensor, crop: tuple[int, int] | None, size: tuple[int, int] | None) -> Tensor:
    """Avoids bfloat16 logits at full resolution, where many classes would tie and their order would decide."""
    return _eager(logits.float(), crop, size)


def _cost(arguments: Arguments, labels: Tensor) -> Cost:
    """Counts four products, three sums and a comparison per class and pixel, at both resolutions."""
    logits, crop, size = arguments
    read = logits.numel() * logits.element_size()
    pixels = labels.numel()
    if size is not None:
        whole = (logits.shape[2] * _FACTOR, logits.shape[3] * _FACTOR)
        height, width = crop or whole
        pixels += len(logits) * height * width
    return Cost(bytes=read + labels.numel() * labels.element_size(), flops=8 * logits.shape[1] * pixels)


COMPARISON = Comparison(
    op="upsample_argmax",
    ours=_ours,
    peers=[
        Peer("eager", _eager_in_float32),
        Peer("torch.compile", peers.compiled(_eager_in_float32), peers.compile_problem, full=True),
    ],
    cases=[
        Case("54 x 200 x 336, noise, NCHW", partial(_noise, NCHW)),
        Case("54 x 200 x 336, noise, channels-last", partial(_noise, NHWC)),
        Case("54 x 200 x 336, scene, channels-last", partial(_scene, NHWC), highlight=True),
        Case("the same to 480 x 640", partial(_scene, NHWC, (800, 1067), (480, 640))),
        Case("the same in bf16", partial(_scene, NHWC, dtype=torch.bfloat16), full=True),
        Case("the same to 2048 x 4096", partial(_scene, NHWC, inputs.IMAGE, inputs.LARGE), full=True),
    ],
    agree=same_labels,
    cost=_cost,
)


ACCURACY = [
    AccuracyCase(
        "upsample_argmax, share of different labels",
        lambda: (small_logits(),),
        lambda logits: upsample_argmax(logits, _FACTOR),
        lambda logits: _eager(logits, None, None),
        is_choice=True,
    )
]


@COMPARISON.rows()
def test_upsample_argmax(row: Row, time_row: Callable[[Row], None]) -> None:
    time_row(row)
