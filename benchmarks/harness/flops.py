"""Counts the floating-point operations of convolutions and matrix products, with torch's counter and with formulas.

A multiplication and an addition are two operations. A Winograd convolution counts as the convolution that it computes,
not as the fewer multiplications that it performs.
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
    """Counts a convolution with output [N, K, H, W] and weights [K, C / groups, h, w]."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _prepared_conv_flops(x: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    """Counts a 3x3 convolution whose weights are transformed."""
    return _conv_flops(x, (out_shape[1], x[1], 3, 3), out_shape=out_shape)


def _weight_gradient_flops(grad: Sequence[int], x: Sequence[int], *_: Any, out_shape: Any, **__: Any) -> int:
    """Counts the gradient of a 3x3 convolution's weights."""
    return 2 * math.prod(out_shape) * x[0] * math.prod(x[2:])


def _conv_statistics_flops(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    """Counts a convolution that also returns the statistics of its output; normalisation is not counted."""
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
    """Counts the product of a matrix [K, C] with each pixel of [N, C, H, W]."""
    return 2 * math.prod(weight) * x[0] * math.prod(x[2:])


def _added_conv_flops(
    added: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any, **__: Any
) -> int:
    """Counts a convolution that accumulates into an existing tensor; element-wise additions are not counted."""
    return _conv_flops(x, weight, out_shape=out_shape)


_FORMULAS: dict[str, Callable[..., int]] = {
    "conv3x3": _conv_flops,
    "conv3x3_prepared": _prepared_conv_flops,
    "conv3x3_statistics": _conv_statistics_flops,
    "conv3x3_weight_gradient": _weight_gradient_flops,
    "group_norm_relu_project": _project_flops,
}


_ONEDNN_FORMULAS: dict[str, Callable[..., int]] = {
    "_convolution_pointwise": _conv_flops,
    "_convolution_pointwise_": _added_conv_flops,
}


def _formulas() -> dict[Any, Callable[..., int]]:
    """Returns the formulas by op: C++ ops, Triton ops if a GPU is present, and oneDNN's fused convolutions."""
    found: dict[Any, Callable[..., int]] = {}
    for name, formula in _FORMULAS.items():
        found[getattr(torch.ops.panfpn_fast, name)] = formula
    for name, formula in _ONEDNN_FORMULAS.items():
        if hasattr(torch.ops.mkldnn, name):
            found[getattr(torch.ops.mkldnn, name)] = formula
    return found


def count_flops(call: Callable[[], Any]) -> int:
    """Runs a call and counts its operations, backward passes included, with torch's `FlopCounterMode`."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        call()
    return counter.get_total_flops()


@dataclass
class Boxes:
    """Numbers of boxes that a network's heads processed, over all images."""

    proposals: int = 0
    detections: int = 0


@contextmanager
def count_boxes(network: PanopticFPN) -> Iterator[Boxes]:
    """Counts the boxes that a network's heads receive inside the block."""
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
    """Returns the operations of a ResNet and the channels of C2 to C5; `pixels` is the number of input pixels."""
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
    """Returns the operations of the semantic head; `pixels` are the numbers of pixels of P2, P3 and so on."""
    channels, classes = config.semantic_channels, config.num_stuff + 1
    total = 0
    for level in range(4):
        # The first convolution runs at the level's own resolution, each further one at the next finer resolution.
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
    """Computes the operations of a prediction from the network's settings.

    Args:
        config: The settings of a network with a ResNet.
        size: Height and width of the padded images, multiples of 32.
        boxes: Numbers of boxes that the heads process.
        images: Number of images in the batch.
        commuted: Whether the semantic predictor precedes the upsampling, at 1/4 for P2 and at 1/8 for P3 to P5, as in
            this package, or follows it, once at 1/4, as in the paper. With summed levels the first order takes 1.75
            times the operations of the second, and moves fewer bytes.

    Returns:
        Operations of each stage in `STAGES`; 0 for stages that the network does not have.
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
        # The transposed convolution, and the predictor of the predicted class only, on four times the pixels.
        found["mask"] += _conv(4 * at, channels, channels) + _conv(4 * at, channels, 1)
    if "semantic" in config.tasks:
        found["semantic"] = _semantic(config, pixels, commuted)
    return found


def training_flops(
    config: PanopticFPNConfig, size: tuple[int, int], boxes: Boxes, *, images: int = 1
) -> dict[str, int]:
    """Computes the operations of a training step of all weights: forward pass, gradients of inputs and of weights.

    Args and result are as in `network_flops`. The gradient of the images is not computed.
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
    """Counts the operations of a call with torch's counter and with the formulas.

    Args:
        networks: The networks that the call runs, each once.
        call: A prediction or a training step.
        images: The images that the call processes.
        training: Whether the call is a training step.

    Returns:
        The operations that torch counts; and the operations by formula, summed over the networks, of each stage in
        `STAGES`.
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
