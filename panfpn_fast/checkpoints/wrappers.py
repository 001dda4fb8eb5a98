"""Finds the tensors of a network in what a training run saves around them.

Wrappers such as DistributedDataParallel and torch.compile add prefixes to the names of tensors, and frameworks put the
tensors under different keys. Only the keys and prefixes listed here are seen through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

# Keys of the tensors, in order of preference. mmengine swaps the averages of its EMA hook into `state_dict`, and the
# weight averaging of Lightning does the same. The averages of others are used if a file has nothing else.
_LEVELS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",  # DeepSpeed
    "network",
    "weights",
    "blobs",  # Caffe2
    "ema_state_dict",
    "state_dict_ema",  # timm
    "model_ema",
    "ema_state",  # d2go
    "ema",
)
# Attributes that hold the network, which become the first part of all names. The averaged network comes last.
_PREFIXES = (
    "module",  # DistributedDataParallel, DataParallel, AveragedModel
    "model",  # LightningModule
    "_model",
    "net",
    "network",
    "detector",
    "architecture",  # mmrazor
    "backbone",  # mmpretrain
    "ema_model",
    "model_ema",
    "averaged_model",
    "ema",
)
# These can appear anywhere in a name: torch.compile, FSDP, activation checkpointing and Fabric wrap parts, too.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Limits for files that nest dictionaries or prefixes without end.
_MAX_LEVELS = 3
_MAX_PREFIXES = 4


def find_weights(content: object, is_network: Callable[[Collection[str]], bool]) -> Mapping[str, Any] | None:
    """Finds the tensors of a network in the content of a file.

    Args:
        content: The content of the file.
        is_network: Returns whether names of tensors are those of a network.

    Returns:
        The tensors by names without the prefixes of wrappers. If no names are those of a network, the dictionary in
        which they were expected; None if that is no dictionary with string keys.
    """
    first: Mapping[str, Any] | None = None
    for candidate in _candidates(content):
        if is_network(candidate):
            return candidate
        first = candidate if first is None else first
    return first


def _candidates(content: object) -> Iterator[Mapping[str, Any]]:
    for level in _levels(content, _MAX_LEVELS):
        if all(isinstance(name, str) for name in level):
            names = {_without_private(name): value for name, value in level.items()}
            yield from _unwrapped(names, _MAX_PREFIXES)


def _levels(content: object, depth: int) -> Iterator[Mapping[Any, Any]]:
    """Yields the dictionaries below a dictionary, deepest first, and then the dictionary."""
    if not isinstance(content, Mapping):
        return
    for key in _LEVELS if depth else ():
        yield from _levels(content.get(key), depth - 1)
    yield content


def _unwrapped(weights: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yields tensors by their names, and then those below each prefix by their names without it."""
    yield weights
    for prefix in _PREFIXES if depth else ():
        start = f"{prefix}."
        inner = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        if inner:
            yield from _unwrapped(inner, depth - 1)


def _without_private(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)
