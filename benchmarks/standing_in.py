"""Networks with random weights that behave like trained ones, since no checkpoint can be had everywhere.

Untrained predictors say nearly the same everywhere: eighty thousand candidates of equal score would enter NMS, and
every pixel would lie on the threshold of its mask. So each predictor's outputs are brought to a mean and a spread, one
channel at a time, on an image of the kind that is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models import PanopticFPN, PanopticFPNConfig

from . import inputs

_SIZE = (320, 448)

# With these some hundred candidates score above 0.05, of which NMS leaves a hundred, and some of them above 0.5.
_CLASS_SPREAD, _BACKGROUND = 2.5, 8.0


def _bring(layer: nn.Module, outputs: Tensor, mean: float | Tensor, spread: float) -> None:
    """Makes the outputs [M, K] of a linear layer or convolution have a mean and a spread in each channel."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert layer.bias is not None
    scale = spread / outputs.std(0).clamp(min=1e-6)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_((layer.bias - outputs.mean(0)) * scale + mean)


def _bring_instances(network: PanopticFPN, pyramid: list[Tensor]) -> None:
    rpn, box_head, mask_head = network.rpn, network.box_head, network.mask_head
    anchors = len(network.config.anchor_ratios)
    logits, deltas = rpn(pyramid)
    _bring(rpn.objectness, torch.cat([level.reshape(-1, anchors) for level in logits]), -2.0, 2.0)
    _bring(rpn.deltas, torch.cat([level.reshape(-1, 4 * anchors) for level in deltas]), 0.0, 0.2)
    logits, deltas = rpn(pyramid)
    proposals = rpn.propose(rpn.anchors(pyramid), logits, deltas, [_SIZE])
    class_logits, box_deltas = box_head(pyramid, proposals)
    means = torch.zeros(class_logits.shape[1])
    means[-1] = _BACKGROUND
    _bring(box_head.class_logits, class_logits, means, _CLASS_SPREAD)
    _bring(box_head.box_deltas, box_deltas.flatten(1), 0.0, 0.5)
    class_logits, box_deltas = box_head(pyramid, proposals)
    [found] = box_head.detect(class_logits, box_deltas, proposals, [_SIZE])
    pooled: list[Tensor] = []
    handle = mask_head.deconv.register_forward_hook(lambda _, __, output: pooled.append(output))
    mask_head(pyramid, [found.boxes], found.classes)
    handle.remove()
    # The head's ReLU after the hook is in place.
    masks = F.conv2d(pooled[0], mask_head.logits.weight, mask_head.logits.bias)
    _bring(mask_head.logits, masks.transpose(0, 1).flatten(1).t(), 1.0, 3.0)


@cache
@torch.no_grad()
def _made(config: PanopticFPNConfig) -> PanopticFPN:
    torch.manual_seed(0)
    network = PanopticFPN.from_config(config).eval()
    # Each residual block adds a little, so that activations keep their size.
    for name, buffer in network.backbone.named_buffers():
        if name.endswith("norm3.weight"):
            buffer.fill_(0.2)
    features = network.features(network.prepare([inputs.image(_SIZE, seed=1)]).images)
    if "instance" in config.tasks:
        _bring_instances(network, features["instance"])
    if "semantic" in config.tasks:
        head = network.semantic_head
        logits = head(features["semantic"])
        _bring(head.logits, logits.transpose(0, 1).flatten(1).t(), 0.0, 2.0)
    return network


@cache
def standing_in(
    backbone: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    kind: Callable[..., PanopticFPN] = PanopticFPN,
    memory_format: torch.memory_format = torch.channels_last,
) -> PanopticFPN:
    """A network for things and stuff in evaluation mode; the same object at every call.

    Args:
        backbone: Of which ResNet.
        device: Where it is.
        dtype: Of its parameters.
        kind: Its class; of any, the weights are the same.
        memory_format: Of its convolutions.
    """
    config = PanopticFPNConfig(backbone=backbone)
    network = kind(**vars(config))
    network.load_state_dict(_made(config).state_dict())
    return network.eval().to(device, dtype).to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]
