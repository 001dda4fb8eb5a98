"""Networks of torchvision and timm as the feature extractor under an FPN."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from panfpn_fast.models.config import BACKBONES, FPN_STRIDES
from panfpn_fast.models.layers import FrozenBatchNorm2d, make_norm

_STRIDES = FPN_STRIDES[:4]
_PROBE = (64, 96)
"""Height and width of the image with which strides are found: no map of it is square."""


class FeatureExtractor(nn.Module):
    """Returns the last feature map that a network has at each of the strides 4, 8, 16 and 32.

    What the network computes after them is cut off. Its weights are random: `panfpn_fast.training.initialize` puts a
    checkpoint's into it.

    Args:
        name: ``"torchvision:NAME"`` or ``"timm:NAME"``, as ``torchvision.models.get_model`` and ``timm.create_model``
            take it.
        norm: what its batch norms become; see :func:`make_norm`.

    Attributes:
        out_channels: channels of C2..C5.

    Raises:
        ImportError: the library is not installed.
        ValueError: it has no such network, or the network takes images of one size only or lacks a map at one of the
            strides.
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
            x: normalised images [N, 3, H, W]; H and W multiples of 32.

        Returns:
            C2..C5 at strides 4, 8, 16 and 32, each [N, C, h, w].
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
            f'backbone: {name!r} cannot be made: {error}. pip install "panfpn_fast[backbones]", or take one of '
            f"{', '.join(BACKBONES)}, which need nothing else"
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
    # timm meets names that it does not know, and networks without such maps, with many types.
    except Exception as error:
        raise ValueError(f"backbone: timm makes no feature extractor of {network!r}: {error}") from error
    missing = [stride for stride in _STRIDES if stride not in strides]
    if missing:
        raise ValueError(f"backbone: {name!r} has no feature maps at the strides {missing}")
    # Where a stride occurs more than once, the last one counts.
    chosen = [len(strides) - 1 - strides[::-1].index(stride) for stride in _STRIDES]
    body: nn.Module = timm.create_model(network, pretrained=False, features_only=True, out_indices=chosen)
    return body


def _maps(found: Any) -> list[Any]:
    """What torchvision returns by name, and timm as a list."""
    return list(found.values()) if isinstance(found, dict) else list(found)


@torch.no_grad()
def _probe(body: nn.Module, name: str) -> list[Any]:
    """What a network returns for a small image, in the mode that leaves its statistics alone."""
    training = body.training
    image = next(body.parameters()).new_zeros(1, 3, *_PROBE)
    try:
        found = _maps(body.eval()(image))
    # Networks that take one size only say so with many types.
    except Exception as error:
        raise ValueError(f"backbone: {name!r} does not take images of any size: {error}") from error
    body.train(training)
    return found


def _is_channels_first(value: Any, stride: int) -> bool:
    return _has_size(value, stride, slice(2, 4))


def _is_channels_last(value: Any, stride: int) -> bool:
    """Whether it is a map [1, h, w, C], as transformers have them."""
    return _has_size(value, stride, slice(1, 3))


def _has_size(value: Any, stride: int, axes: slice) -> bool:
    size = tuple(side // stride for side in _PROBE)
    return isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[axes]) == size


def _replace_norms(body: nn.Module, norm: str) -> None:
    """Replaces batch norms by normalisations of the kind, which keep their eps and begin as they do."""
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
