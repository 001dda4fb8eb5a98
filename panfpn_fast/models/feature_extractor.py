"""Networks of torchvision and timm as the backbone of an FPN."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from panfpn_fast.models.config import FPN_STRIDES
from panfpn_fast.models.layers import FrozenBatchNorm2d, make_norm

_STRIDES = FPN_STRIDES[:4]
_PROBE = (64, 96)
"""Height and width of the image that reveals the strides; none of its feature maps is square."""


class FeatureExtractor(nn.Module):
    """Returns the last feature map of a network at each of the strides 4, 8, 16 and 32.

    Later layers of the network are removed. Its weights are random; `panfpn_fast.training.initialize` loads the weights
    of a checkpoint.

    Args:
        name: `"torchvision:NAME"` or `"timm:NAME"`, with a name for `torchvision.models.get_model` or
            `timm.create_model`.
        norm: Kind of normalisation that replaces the batch norms, see `make_norm`.

    Attributes:
        out_channels: Numbers of channels of C2 to C5.

    Raises:
        ImportError: If the library is not installed.
        ValueError: If the library has no network of this name, or if the network takes images of only one size or
            lacks a feature map at one of the strides.
    """

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        library, _, network = name.partition(":")
        self.body = _torchvision(name, network) if library == "torchvision" else _timm(name, network)
        maps = _probe(self.body, name)
        self.channels_last = [
            _is_channels_last(map, stride) for map, stride in zip(maps, _STRIDES, strict=True)
        ]
        self.out_channels = [
            map.shape[3 if last else 1] for map, last in zip(maps, self.channels_last, strict=True)
        ]
        _replace_norms(self.body, norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes the features.

        Args:
            x: Normalised images [N, 3, H, W]; H and W are multiples of 32.

        Returns:
            C2 to C5 at strides 4, 8, 16 and 32, each [N, C, h, w].
        """
        return [
            map.permute(0, 3, 1, 2) if last else map
            for map, last in zip(_maps(self.body(x)), self.channels_last, strict=True)
        ]


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"backbone: {name!r} needs a library that cannot be imported: {error}. Run "
            f"pip install {name.partition(':')[0]}, or use a backbone without it, such as resnet50"
        ) from error


def _torchvision(name: str, network: str) -> nn.Module:
    models = _import("torchvision.models", name)
    extraction = _import("torchvision.models.feature_extraction", name)
    try:
        whole: nn.Module = models.get_model(network, weights=None).eval()
    except ValueError as error:
        raise ValueError(f"backbone: torchvision has no network {network!r}: {error}") from error
    _, nodes = extraction.get_graph_node_names(whole)
    found = _probe(extraction.create_feature_extractor(whole, nodes), name)
    last: dict[int, str] = {}
    for node, value in zip(nodes, found, strict=True):
        for stride in _STRIDES:
            if _is_channels_first(value, stride) or _is_channels_last(value, stride):
                last[stride] = node
    missing = [stride for stride in _STRIDES if stride not in last]
    if missing:
        raise ValueError(f"backbone: {name!r} has no feature maps at the strides {missing}")
    body: nn.Module = extraction.create_feature_extractor(whole, [last[stride] for stride in _STRIDES])
    return body.train()


def _timm(name: str, network: str) -> nn.Module:
    timm = _import("timm", name)
    try:
        whole = timm.create_model(network, pretrained=False, features_only=True)
        strides = whole.feature_info.reduction()
    # timm raises various exception types for unknown names and for networks without feature maps.
    except Exception as error:
        raise ValueError(
            f"backbone: timm cannot make a feature extractor from {network!r}: {error}"
        ) from error
    missing = [stride for stride in _STRIDES if stride not in strides]
    if missing:
        raise ValueError(f"backbone: {name!r} has no feature maps at the strides {missing}")
    # If a stride occurs more than once, the last map is used.
    chosen = [len(strides) - 1 - strides[::-1].index(stride) for stride in _STRIDES]
    body: nn.Module = timm.create_model(network, pretrained=False, features_only=True, out_indices=chosen)
    return body


def _maps(found: Any) -> list[Any]:
    """Converts feature maps, which torchvision returns by name and timm as a list, to a list."""
    return list(found.values()) if isinstance(found, dict) else list(found)


@torch.no_grad()
def _probe(body: nn.Module, name: str) -> list[Any]:
    """Returns the output of a network for a small image, in evaluation mode, which keeps its statistics."""
    training = body.training
    image = next(body.parameters()).new_zeros(1, 3, *_PROBE)
    try:
        found = _maps(body.eval()(image))
    # Networks that take only one size raise various exception types.
    except Exception as error:
        raise ValueError(f"backbone: {name!r} does not take images of any size: {error}") from error
    body.train(training)
    return found


def _is_channels_first(value: Any, stride: int) -> bool:
    return _has_size(value, stride, slice(2, 4))


def _is_channels_last(value: Any, stride: int) -> bool:
    """Returns whether a value is a map [1, h, w, C] of a stride, as in transformers."""
    return _has_size(value, stride, slice(1, 3))


def _has_size(value: Any, stride: int, axes: slice) -> bool:
    size = tuple(side // stride for side in _PROBE)
    return isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[axes]) == size


def _replace_norms(body: nn.Module, norm: str) -> None:
    """Replaces batch norms by another kind of normalisation that copies their eps and, if it has them, their values."""
    for path, module in list(body.named_modules()):
        if not isinstance(module, nn.BatchNorm2d) or norm == "bn":
            continue
        new: Any = make_norm(norm, module.num_features)
        new.eps = module.eps
        if isinstance(new, FrozenBatchNorm2d | nn.SyncBatchNorm):
            new.load_state_dict(
                {key: value for key, value in module.state_dict().items() if key in new.state_dict()}
            )
        if isinstance(new, nn.SyncBatchNorm):
            new.momentum = module.momentum
        parent, _, child = path.rpartition(".")
        setattr(body.get_submodule(parent), child, new)
