"""Prediction in fewer passes over memory: what follows a convolution is done as its result is stored.

On the CPU by oneDNN's convolutions with additions and ReLU, which torch.compile uses too. They need no gradient to be
wanted. Batch norms become part of the convolutions before them in a network of its own, `for_prediction`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast.models.layers import FrozenBatchNorm2d

_Module = TypeVar("_Module", bound=nn.Module)

_FUSED_DTYPES = (torch.float32, torch.bfloat16)
_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def _has_fused_ops() -> bool:
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
    return torch.backends.mkldnn.is_available() and fused is not None


_HAS_FUSED_OPS = _has_fused_ops()


def conv2d(conv: nn.Module, x: Tensor, *, relu: bool = False, added: Tensor | None = None) -> Tensor:
    """Applies a convolution, adds to it, and applies ReLU.

    Args:
        conv: an `nn.Conv2d`; anything else that stands in its place is called as it is.
        x: its input, [N, C, H, W].
        relu: whether negative values become 0.
        added: what is added, of the result's shape. Where gradients are off, it may be overwritten.

    Returns:
        [N, K, H', W'].
    """
    if type(conv) is not nn.Conv2d or not _can_fuse(conv, x, added):
        y: Tensor = conv(x)
        if added is not None:
            y = y + added
        return F.relu_(y) if relu else y
    where = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if added is None:
        name = "relu" if relu else "none"
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, *where, name, [], ""
        )
        return found
    sum_of_both: Tensor = torch.ops.mkldnn._convolution_pointwise_(
        added, x, conv.weight, conv.bias, *where, "add", 1.0, "relu" if relu else None, [], ""
    )
    return sum_of_both


def _can_fuse(conv: nn.Conv2d, x: Tensor, added: Tensor | None) -> bool:
    operands = [x, conv.weight] if added is None else [x, conv.weight, added]
    return (
        _HAS_FUSED_OPS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and x.dtype in _FUSED_DTYPES
        and x.numel() > 0
        and all(type(operand) in (Tensor, nn.Parameter) for operand in operands)
        and all(operand.device.type == "cpu" and operand.dtype == x.dtype for operand in operands)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        # Whoever watches the convolution sees it called.
        and not conv._forward_hooks
        and not conv._forward_pre_hooks
    )


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False, added: Tensor | None = None
) -> Tensor:
    """Applies a convolution and a normalisation, adds to it, and applies ReLU; see :func:`conv2d`.

    Args:
        conv: an `nn.Conv2d`.
        norm: the normalisation; the identity where it is part of the convolution.
        x: [N, C, H, W].
        relu: whether negative values become 0.
        added: what is added, of the result's shape. Where gradients are off, it may be overwritten.

    Returns:
        [N, K, H', W'].
    """
    if isinstance(norm, nn.Identity):
        return conv2d(conv, x, relu=relu, added=added)
    y: Tensor = norm(conv(x))
    if added is not None:
        y = y + added
    return F.relu_(y) if relu else y


def for_prediction(network: _Module) -> _Module:
    """Makes a network that predicts the same in less time: batch norms of its ResNets become part of convolutions.

    Args:
        network: a :class:`PanopticFPN` or another module that consists of such; it is left as it is.

    Returns:
        A network for evaluation, which shares all other weights with the one given. It knows the statistics and
        weights of the batch norms and of their convolutions as they are now: make another one after they change. The
        one given, if there is nothing to fold.

    Note:
        Products of weights are computed in float64 and rounded once. Where gradients are off, a block of its ResNet
        may overwrite its input.

    Example:
        >>> from panfpn_fast.models import PanopticFPN
        >>> network = PanopticFPN(backbone="resnet18").eval()
        >>> for_prediction(network).backbone.norm1
        Identity()
    """
    if any(True for _ in _foldable(network, recurse=False)):
        return _folded(network)
    changed = {
        name: after
        for name, child in network.named_children()
        if (after := for_prediction(child)) is not child
    }
    if not changed:
        return network
    result = copy.copy(network)
    result._modules = {**network._modules, **changed}
    return result


def _foldable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[nn.Module, str, nn.Conv2d, Any]]:
    """Batch norms behind convolutions: the module that has both, the norm's name there, and both.

    By the names that our ResNet gives them: norm1 follows conv1, and in a shortcut norm follows conv.
    """
    for module in network.modules() if recurse else [network]:
        for name, norm in list(module.named_children()):
            conv = getattr(module, name.replace("norm", "conv"), None)
            if isinstance(norm, _NORMS) and norm.running_var is not None and isinstance(conv, nn.Conv2d):
                yield module, name, conv, norm


@torch.no_grad()
def _folded(network: _Module) -> _Module:
    result = copy.deepcopy(network).eval().requires_grad_(False)
    for module, name, conv, norm in _foldable(result):
        mean, var, weight, bias = (
            value.double() for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        scale = weight * (var + norm.eps).rsqrt()
        conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        shift = bias - mean * scale
        if conv.bias is not None:
            shift += conv.bias.double() * scale
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        setattr(module, name, nn.Identity())
    return result
