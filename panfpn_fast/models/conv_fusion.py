"""Fuses convolutions with the operations that follow them, to predict with fewer passes over memory.

On the CPU, 3x3 convolutions with stride 1 use `ops.conv3x3`, in training too. oneDNN's other convolutions, which
torch.compile uses too, add and apply ReLU as they store the result; on CUDA, cuDNN's do so before a ReLU. Both require
gradients to be off. `for_prediction` makes a copy of a network whose batch norms are folded into the convolutions and
whose weights are transformed once. Training folds frozen batch norms in each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from panfpn_fast import ops
from panfpn_fast._layout import channels_last_only
from panfpn_fast.models import cudnn_fusion
from panfpn_fast.models.layers import FrozenBatchNorm2d, at_least_float32
from panfpn_fast.ops._winograd import is_transformed, takes_winograd

_Module = TypeVar("_Module", bound=nn.Module)

_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def _has_fused_ops() -> bool:
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
    return torch.backends.mkldnn.is_available() and fused is not None


def _fused_dtypes() -> tuple[torch.dtype, ...]:
    """Returns the dtypes of torch's fused operations; on processors with AVX2 alone they refuse bfloat16."""
    with_bfloat16 = _HAS_FUSED_OPS and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if with_bfloat16 else (torch.float32,)


_HAS_FUSED_OPS = _has_fused_ops()
_FUSED_DTYPES = _fused_dtypes()


class PreparedConv2d(nn.Conv2d):
    """A 3x3 convolution that keeps its weights as `ops.conv3x3` needs them.

    The transformed weights follow the weights to other devices and dtypes. They are transformed again after
    `load_state_dict`, after changes in place, such as an optimizer's, and if the parameter is replaced.

    Note:
        Changes through `weight.data` or NumPy, and of weights that were made in inference mode, cannot be seen: call
        `for_prediction` again. A compiled or exported program does not look for changes in place either.
    """

    _prepared: Tensor | None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> PreparedConv2d:
        """Makes a layer that shares the weights of `conv`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(conv.__dict__, _buffers={}, _non_persistent_buffers_set=set())
        layer.register_buffer("_prepared", None, persistent=False)
        layer._prepare()
        return layer

    @property
    def prepared(self) -> Tensor | None:
        """The transformed weights, or None where `ops.conv3x3` does not use them."""
        if not torch.compiler.is_compiling() and not is_transformed() and self._has_changed():
            self._prepare()
        return self._prepared

    def _prepare(self) -> None:
        # The alias keeps the memory of the weights, so that no other weights can get their address. The version is read
        # before the weights, so that a change in between is seen next time.
        source = (self.weight.detach(), _version(self.weight))
        self._prepared = ops.winograd.prepare(source[0])
        self._source = source

    def _has_changed(self) -> bool:
        (source, version), weight = self._source, self.weight
        return weight.data_ptr() != source.data_ptr() or _version(weight) != version

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        self._prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreparedConv2d:
        self._prepared = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    # Copies and pickled networks do without the transformed weights, which are four times as large as the weights.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {"_prepared": None}, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def forward(self, input: Tensor) -> Tensor:
        """Applies the convolution, as `nn.Conv2d` does."""
        # torch.fx traces with other objects than tensors.
        if isinstance(input, Tensor) and input.dim() == 4 and _takes_winograd(self, input, None):
            return ops.conv3x3(input, self.weight, self.bias, prepared=self.prepared)
        return super().forward(input)


def _version(weight: Tensor) -> int:
    """Returns the number of changes in place. Tensors made in inference mode do not count them."""
    return 0 if weight.is_inference() else weight._version


def _is_3x3(conv: nn.Conv2d) -> bool:
    """Whether `ops.conv3x3` computes the convolution."""
    where = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return where == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks must see the module called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _call(module: nn.Module, x: Tensor, relu: bool, added: Tensor | None) -> Tensor:
    """Calls a module, adds a tensor and applies ReLU."""
    y: Tensor = module(x)
    if added is not None:
        return F.relu_(y + added) if relu else y + added
    if not relu:
        return y
    # A hook may have kept the result, autograd refuses changes in place behind a backward hook, and a user's module may
    # return its input or need its result for its gradient.
    is_own = type(module) in (nn.Conv2d, PreparedConv2d, nn.GroupNorm, *_NORMS) and not is_hooked(module)
    return F.relu_(y) if is_own else F.relu(y)


def conv2d(conv: nn.Module, x: Tensor, *, relu: bool = False, added: Tensor | None = None) -> Tensor:
    """Applies a convolution, adds a tensor and applies ReLU.

    Args:
        conv: An `nn.Conv2d`. Any other module in its place is called without fusion.
        x: Input of the convolution, [N, C, H, W].
        relu: Whether to apply ReLU.
        added: Tensor to add, in the shape of the result. It may be overwritten if gradients are off.

    Returns:
        [N, K, H', W'].
    """
    if not isinstance(conv, nn.Conv2d) or is_hooked(conv):
        return _call(conv, x, relu, added)
    if _takes_winograd(conv, x, added):
        return ops.conv3x3(x, conv.weight, conv.bias, relu, added, getattr(conv, "prepared", None))
    if not _can_fuse(conv, x, added):
        return _call(conv, x, relu, added)
    if x.device.type == cudnn_fusion.DEVICE_TYPE:
        found = cudnn_fusion.convolve_relu(conv, x, added) if relu else None
        return _call(conv, x, relu, added) if found is None else found
    return _in_onednn(conv, x, relu, added)


def _in_onednn(conv: nn.Conv2d, x: Tensor, relu: bool, added: Tensor | None) -> Tensor:
    where = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if added is None:
        name = "relu" if relu else "none"
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, conv.weight, conv.bias, *where, name, [], ""
        )
        return found
    # In bfloat16, torch's operation adds and applies ReLU in channels-last alone.
    with_relu = x.dtype == torch.float32 or (channels_last_only(x) and channels_last_only(added))
    unary = "relu" if relu and with_relu else None
    sum_of_both: Tensor = torch.ops.mkldnn._convolution_pointwise_(
        added, x, conv.weight, conv.bias, *where, "add", 1.0, unary, [], ""
    )
    return F.relu_(sum_of_both) if relu and not with_relu else sum_of_both


def conv1x1_of_both(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Applies two 1x1 convolutions to one input, in one pass over it.

    Args:
        first: An `nn.Conv2d` with K1 outputs. If one of the modules is anything else, each is called by itself.
        second: An `nn.Conv2d` with K2 outputs.
        x: Their input, [N, C, H, W].

    Returns:
        [N, K1, H, W] and [N, K2, H, W], which may be views of one tensor.
    """
    if torch.compiler.is_compiling() or not (_is_plain_1x1(first) and _is_plain_1x1(second)):
        return conv2d(first, x), conv2d(second, x)
    if first.bias is None or second.bias is None:
        return conv2d(first, x), conv2d(second, x)
    weight, bias = torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias])
    if x.device.type == "cpu" and _can_fuse(first, x, None) and _can_fuse(second, x, None):
        zeros, ones = (0, 0), (1, 1)
        both = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, zeros, ones, ones, 1, "none", [], "")
    else:
        both = F.conv2d(x, weight, bias)
    found, others = both.split([first.out_channels, second.out_channels], dim=1)
    return found, others


def _is_plain_1x1(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a 1x1 convolution with no stride and no hooks."""
    return (
        type(conv) is nn.Conv2d
        and not is_hooked(conv)
        and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    )


def _takes_winograd(conv: nn.Conv2d, x: Tensor, added: Tensor | None) -> bool:
    return (
        type(conv) in (nn.Conv2d, PreparedConv2d)
        and _is_3x3(conv)
        and takes_winograd(x, conv.weight, prepared=getattr(conv, "_prepared", None) is not None)
        and (added is None or added.dtype == x.dtype)
    )


def _can_fuse(conv: nn.Conv2d, x: Tensor, added: Tensor | None) -> bool:
    operands = [x, conv.weight] if added is None else [x, conv.weight, added]
    return (
        type(conv) in (nn.Conv2d, PreparedConv2d)
        and not torch.is_grad_enabled()
        and not is_transformed()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and x.numel() > 0
        and all(type(operand) in (Tensor, nn.Parameter) for operand in operands)
        and all(operand.device == x.device and operand.dtype == x.dtype for operand in operands)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and _has_fused_convolutions(x)
    )


def _has_fused_convolutions(x: Tensor) -> bool:
    """Whether oneDNN or cuDNN fuses convolutions on the device of `x`, in its dtype."""
    if x.device.type == cudnn_fusion.DEVICE_TYPE:
        return cudnn_fusion.has_cudnn(x)
    return (
        x.device.type == "cpu"
        and _HAS_FUSED_OPS
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and x.dtype in _FUSED_DTYPES
    )


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False, added: Tensor | None = None
) -> Tensor:
    """Applies a convolution and a normalisation, adds a tensor and applies ReLU; see `conv2d`.

    Args:
        conv: An `nn.Conv2d`.
        norm: The normalisation, or the identity if it is folded into the convolution.
        x: Input of the convolution, [N, C, H, W].
        relu: Whether to apply ReLU.
        added: Tensor to add, in the shape of the result. It may be overwritten if gradients are off.

    Returns:
        [N, K, H', W'].
    """
    if isinstance(norm, nn.Identity):
        return conv2d(conv, x, relu=relu, added=added)
    if (
        torch.is_grad_enabled()
        and isinstance(conv, nn.Conv2d)
        and type(conv) in (nn.Conv2d, PreparedConv2d)
        and type(norm) is FrozenBatchNorm2d
        and not (is_hooked(conv) or is_hooked(norm))
    ):
        return _conv_frozen_norm(conv, norm, x, relu, added)
    return _call(norm, conv2d(conv, x), relu, added)


def _conv_frozen_norm(
    conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor, relu: bool, added: Tensor | None
) -> Tensor:
    """Applies a convolution with weights that contain the batch norm, so that the backward pass keeps one map less."""
    dtype = at_least_float32(conv.weight.dtype)
    scale = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    shift = norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
    bias = shift.to(weight.dtype)
    if _takes_winograd(conv, x, added):
        return ops.conv3x3(x, weight, bias, relu, added)
    y = conv._conv_forward(x, weight, bias)
    y = y if added is None else y + added
    return F.relu_(y) if relu else y


def for_prediction(network: _Module) -> _Module:
    """Makes a faster network with equal predictions.

    The batch norms of its ResNets are folded into the convolutions, and the weights of 3x3 convolutions on the CPU are
    transformed for `ops.conv3x3`.

    Args:
        network: A `PanopticFPN`, or a module that contains such networks. It is not changed.

    Returns:
        A network for evaluation that shares all other weights with `network`. The folded weights are a snapshot: call
        this function again after they change. `PreparedConv2d` says when the transformed weights follow a change.

    Note:
        Products of weights are computed in float64 and rounded once. With gradients off, a block of the ResNet may
        overwrite its input. The transformed weights take four times the memory of the 3x3 convolutions' weights, for a
        ResNet-50 network 0.3 GB.

    Example:
        >>> from panfpn_fast.models import PanopticFPN
        >>> network = PanopticFPN(backbone="resnet18").eval()
        >>> for_prediction(network).backbone.norm1
        Identity()
    """
    return prepare_convolutions(fold_norms(network))


def fold_norms(network: _Module) -> _Module:
    """Folds the batch norms of a network's ResNets into the convolutions; see `for_prediction`."""

    def change(module: nn.Module) -> nn.Module:
        return _folded(module) if any(True for _ in _foldable(module, recurse=False)) else module

    return _rebuilt(network, change, {})


def prepare_convolutions(network: _Module) -> _Module:
    """Transforms the weights of a network's 3x3 convolutions; see `for_prediction`."""

    def change(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, PreparedConv2d) and _is_3x3(module):
            return PreparedConv2d.of(module)
        return module

    return _rebuilt(network, change, {})


def _rebuilt(
    network: nn.Module, change: Callable[[nn.Module], nn.Module], found: dict[nn.Module, nn.Module]
) -> Any:
    """Applies a function to a module and then to its children; copies those whose children change.

    `found` has the results of the modules so far, so that modules which are shared stay shared.
    """
    if network in found:
        return found[network]
    result = change(network)
    children = {name: child for name, child in result._modules.items() if child is not None}
    changed = {
        name: after
        for name, child in children.items()
        if (after := _rebuilt(child, change, found)) is not child
    }
    if changed:
        result = copy.copy(result)
        result._modules = {**result._modules, **changed}
    found[network] = result
    return result


def _foldable(network: nn.Module, recurse: bool = True) -> Iterator[tuple[nn.Module, str, nn.Conv2d, Any]]:
    """Yields each batch norm after a convolution: their parent module, the norm's name in it, convolution and norm.

    Pairs are found by the names in our ResNet: norm1 follows conv1, and in a shortcut norm follows conv.
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
