"""Networks with random weights that behave like trained ones, since a checkpoint is not available everywhere.

The outputs of untrained predictors are nearly constant: eighty thousand candidates of equal score would enter NMS, and
every pixel would be at the threshold of its mask. Each predictor is therefore rescaled so that each channel of its
output has a given mean and standard deviation on an image like the timed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig

from ..harness import inputs

_SIZE = (320, 448)

# With these values some hundred candidates score above 0.05. NMS leaves a hundred, some of which score above 0.5.
_CLASS_SPREAD, _BACKGROUND = 2.5, 8.0


def _rescale(layer: nn.Module, outputs: Tensor, mean: float | Tensor, spread: float) -> None:
    """Rescales a linear layer or convolution with outputs [M, K] to a mean and standard deviation in each channel."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    scale = spread / outputs.std(0).clamp(min=1e-6)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_((layer.bias - outputs.mean(0)) * scale + mean)


def _rescale_instances(network: PanopticFPN, pyramid: list[Tensor]) -> None:
    rpn, box_head, mask_head = network.rpn, network.box_head, network.mask_head
    anchors = len(network.config.anchor_ratios)
    logits, deltas = rpn(pyramid)
    _rescale(rpn.objectness, torch.cat([level.reshape(-1, anchors) for level in logits]), -2.0, 2.0)
    _rescale(rpn.deltas, torch.cat([level.reshape(-1, 4 * anchors) for level in deltas]), 0.0, 0.2)
    logits, deltas = rpn(pyramid)
    proposals = rpn.propose(rpn.anchors(pyramid), logits, deltas, [_SIZE])
    class_logits, box_deltas = box_head(pyramid, proposals)
    means = torch.zeros(class_logits.shape[1])
    means[-1] = _BACKGROUND
    _rescale(box_head.class_logits, class_logits, means, _CLASS_SPREAD)
    _rescale(box_head.box_deltas, box_deltas.flatten(1), 0.0, 0.5)
    class_logits, box_deltas = box_head(pyramid, proposals)
    [found] = box_head.detect(class_logits, box_deltas, proposals, [_SIZE])
    pooled: list[Tensor] = []
    handle = mask_head.deconv.register_forward_hook(lambda _, __, output: pooled.append(output))
    mask_head(pyramid, [found.boxes], found.classes)
    handle.remove()
    # The head applies its ReLU in place, after the hook stored the tensor, so `pooled` holds the result of the ReLU.
    masks = F.conv2d(pooled[0], mask_head.logits.weight, mask_head.logits.bias)
    _rescale(mask_head.logits, masks.transpose(0, 1).flatten(1).t(), 1.0, 3.0)


@cache
@torch.no_grad()
def _made(config: PanopticFPNConfig) -> PanopticFPN:
    torch.manual_seed(0)
    network = PanopticFPN.from_config(config).eval()
    # Each residual block adds little, so that the magnitude of the activations does not grow.
    for name, buffer in network.backbone.named_buffers():
        if name.endswith("norm3.weight"):
            buffer.fill_(0.2)
    features = network.features(network.prepare([inputs.image(_SIZE, seed=1)]).images)
    if "instance" in config.tasks:
        _rescale_instances(network, features["instance"])
    if "semantic" in config.tasks:
        head = network.semantic_head
        logits = head(features["semantic"])
        _rescale(head.logits, logits.transpose(0, 1).flatten(1).t(), 0.0, 2.0)
    return network


@cache
def stand_in(
    backbone: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    kind: Callable[..., PanopticFPN] = PanopticFPN,
    memory_format: torch.memory_format = torch.channels_last,
) -> PanopticFPN:
    """Returns a network for things and stuff in evaluation mode; equal arguments return the same object.

    Args:
        backbone: Name of the ResNet.
        device: Device of the network.
        dtype: Dtype of the parameters.
        kind: Class of the network. All classes get the same weights.
        memory_format: Memory format of the convolutions.
    """
    config = PanopticFPNConfig(backbone=backbone)
    network = kind(**vars(config))
    network.load_state_dict(_made(config).state_dict())
    return network.eval().to(device, dtype).to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]
