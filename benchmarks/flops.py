"""Floating-point operations of convolutions and matrix products: counted by torch, and from formulas.

A multiplication and an addition are two operations. The Winograd convolution of the semantic head counts as what it
computes, not as the fewer multiplications that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig
from panfpn_fast.models.config import BACKBONES, FPN_STRIDES

STAGES = ("backbone", "fpn", "rpn", "box", "mask", "semantic")
"""The parts of a network that have convolutions or matrix products."""


def _conv_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    """Of a convolution to [N, K, H, W] whose weights are [K, C / groups, h, w]."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _conv_statistics_flops(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    """Of the same with the statistics of its result, which count as nothing, as all normalisation does."""
    return _conv_flops(x, weight, out_shape=out_shape[0])


def _project_flops(
    x: Sequence[int],
    mean: Sequence[int],
    rstd: Sequence[int],
    gn_weight: Sequence[int],
    gn_bias: Sequence[int],
    weight: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Of the matrix [K, C] on each pixel of [N, C, H, W]."""
    return 2 * math.prod(weight) * x[0] * math.prod(x[2:])


def _added_conv_flops(
    added: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    """Of a convolution whose result is added to what is there; additions of pixels count as nothing."""
    return _conv_flops(x, weight, out_shape=out_shape)


_FORMULAS: dict[str, Callable[..., int]] = {
    "conv3x3": _conv_flops,
    "conv3x3_statistics": _conv_statistics_flops,
    "group_norm_relu_project": _project_flops,
}


_ONEDNN_FORMULAS: dict[str, Callable[..., int]] = {
    "_convolution_pointwise": _conv_flops,
    "_convolution_pointwise_": _added_conv_flops,
}


def _formulas() -> dict[Any, Callable[..., int]]:
    """By op: of the C++ ops, of the Triton ops where there is a GPU for them, and of oneDNN's fused convolutions."""
    found: dict[Any, Callable[..., int]] = {}
    for namespace in (torch.ops.panfpn_fast, torch.ops.panfpn_fast_triton):
        for name, formula in _FORMULAS.items():
            if hasattr(namespace, name):
                found[getattr(namespace, name)] = formula
    for name, formula in _ONEDNN_FORMULAS.items():
        if hasattr(torch.ops.mkldnn, name):
            found[getattr(torch.ops.mkldnn, name)] = formula
    return found


def count_flops(call: Callable[[], Any]) -> int:
    """Runs a call and counts by torch's FlopCounterMode, which sees backward passes too."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return counter.get_total_flops()


@dataclass
class Boxes:
    """How many boxes a network's heads looked at, over all images."""

    proposals: int = 0
    detections: int = 0


@contextmanager
def count_boxes(network: PanopticFPN) -> Iterator[Boxes]:
    """Counts the boxes that the heads of a network get until the block ends."""
    boxes = Boxes()

    def proposed(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        boxes.proposals += sum(map(len, arguments[1]))

    def detected(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        boxes.detections += sum(map(len, arguments[1]))

    handles = []
    if "instance" in network.config.tasks:
        handles.append(network.box_head.register_forward_pre_hook(proposed))
        handles.append(network.mask_head.register_forward_pre_hook(detected))
    try:
        yield boxes
    finally:
        for handle in handles:
            handle.remove()


def _conv(pixels: int, in_channels: int, channels: int, side: int = 1) -> int:
    return 2 * pixels * in_channels * channels * side**2


def _backbone(config: PanopticFPNConfig, pixels: int) -> tuple[int, list[int]]:
    """Returns the operations of a ResNet, and the channels of C2..C5; `pixels` are those of the input."""
    layout = BACKBONES[config.backbone]
    total = _stem(config, pixels)
    in_channels = layout.width
    outputs = []
    for stage, blocks in enumerate(layout.blocks):
        channels = layout.width * 2**stage
        at = pixels // 16 // 4**stage
        for block in range(blocks):
            before = 4 * at if block == 0 and stage > 0 else at
            if layout.bottleneck:
                width, out_channels = channels * layout.group_width // 64 * layout.groups, 4 * channels
                total += _conv(at if config.stride_in_1x1 else before, in_channels, width)
                total += _conv(at, width // layout.groups, width, 3) + _conv(at, width, out_channels)
            else:
                out_channels = channels
                total += _conv(at, in_channels, channels, 3) + _conv(at, channels, channels, 3)
            if before != at or in_channels != out_channels:
                total += _conv(at, in_channels, out_channels)
            in_channels = out_channels
        outputs.append(in_channels)
    return total, outputs


def _stem(config: PanopticFPNConfig, pixels: int) -> int:
    return _conv(pixels // 4, 3, BACKBONES[config.backbone].width, 7)


def _semantic(config: PanopticFPNConfig, pixels: Sequence[int], commuted: bool) -> int:
    """`pixels` are those of P2, P3 and so on."""
    channels, classes = config.semantic_channels, config.num_stuff + 1
    total = 0
    for level in range(4):
        # The first convolution is on the level itself, and each further one on the next finer level.
        for stage in range(max(level, 1)):
            total += _conv(pixels[level - stage], channels if stage else config.branch_channels, channels, 3)
    if commuted:
        return total + sum(_conv(pixels[min(level, 1)], channels, classes) for level in range(4))
    parts = 4 if config.semantic_fusion == "concat" else 1
    return total + _conv(pixels[0], parts * channels, classes)


def network_flops(
    config: PanopticFPNConfig,
    size: tuple[int, int],
    boxes: Boxes,
    *,
    images: int = 1,
    commuted: bool = True,
) -> dict[str, int]:
    """The operations of a prediction, from the network's settings alone.

    Args:
        config: The network's; with a ResNet.
        size: Height and width of the padded images, multiples of 32.
        boxes: How many the heads look at.
        images: In the batch.
        commuted: Whether the semantic predictor comes before the upsampling, at 1/4 for P2 and at 1/8 for P3 to P5,
            as in this package, or after it, once at 1/4, as in the paper; with summed levels the first
            takes 1.75 times the operations of the second, and fewer bytes.

    Returns:
        Operations for each of :data:`STAGES`, 0 of those that the network does not have.
    """
    pixels = [images * -(-size[0] // stride) * -(-size[1] // stride) for stride in FPN_STRIDES]
    found = dict.fromkeys(STAGES, 0)
    found["backbone"], in_channels = _backbone(config, images * size[0] * size[1])
    channels = config.branch_channels
    for at, c in zip(pixels, in_channels, strict=False):
        found["fpn"] += _conv(at, c, channels) + _conv(at, channels, channels, 3)
    if config.fpn_groups > 1:
        found["fpn"] *= len(config.tasks)
    if "instance" in config.tasks:
        things = config.num_things
        anchors = len(config.anchor_ratios)
        found["rpn"] = sum(
            _conv(at, channels, channels, 3) + _conv(at, channels, 5 * anchors) for at in pixels
        )
        hidden = config.box_head_channels
        refined = 4 * (1 if config.class_agnostic_boxes else things)
        pooled = channels * config.box_pool_size**2
        found["box"] = _conv(boxes.proposals, pooled + hidden, hidden)
        found["box"] += _conv(boxes.proposals, hidden, things + 1 + refined)
        at, channels = boxes.detections * config.mask_pool_size**2, config.mask_head_channels
        for i in range(config.mask_head_convs):
            found["mask"] += _conv(at, channels if i else config.branch_channels, channels, 3)
        # The transposed convolution, and the predictor of the one class that is wanted, on four times the pixels.
        found["mask"] += _conv(4 * at, channels, channels) + _conv(4 * at, channels, 1)
    if "semantic" in config.tasks:
        found["semantic"] = _semantic(config, pixels, commuted)
    return found


def training_flops(
    config: PanopticFPNConfig, size: tuple[int, int], boxes: Boxes, *, images: int = 1
) -> dict[str, int]:
    """The operations of a training step of all weights: forward, and the gradients of inputs and of weights.

    Takes what :func:`network_flops` takes and returns the same; no one asks for the gradient of the images.
    """
    found = {stage: 3 * flops for stage, flops in network_flops(config, size, boxes, images=images).items()}
    found["backbone"] -= _stem(config, images * size[0] * size[1])
    return found


def both_ways(
    networks: Sequence[PanopticFPN],
    call: Callable[[], Any],
    images: Sequence[Tensor],
    *,
    training: bool = False,
) -> tuple[int, dict[str, int]]:
    """Counts a call, and applies the formulas to it.

    Args:
        networks: Those that take part in the call, once each.
        call: A prediction, or a training step.
        images: What the call takes.
        training: Whether it is a training step.

    Returns:
        The operations as torch counts them; and by formula, of all networks together, for each of :data:`STAGES`.
    """
    with ExitStack() as stack:
        boxes = [stack.enter_context(count_boxes(network)) for network in networks]
        counted = count_flops(call)
    formula = training_flops if training else network_flops
    found = dict.fromkeys(STAGES, 0)
    for network, seen in zip(networks, boxes, strict=True):
        height, width = network.prepare(images).images.shape[2:]
        for stage, flops in formula(network.config, (height, width), seen, images=len(images)).items():
            found[stage] += flops
    return counted, found
