"""Counts the tensors that a network keeps for its backward pass, and the outputs of its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(modules: list[nn.Module], forward: Callable[[], Any]) -> int:
    """Returns the bytes that autograd keeps at the end of a forward pass: the memory of activations in training.

    Args:
        modules: The modules whose parameters and buffers are not counted.
        forward: Runs the forward pass and returns the tensors to differentiate.

    Returns:
        The total size of the storages, each counted once, even if several operations keep it.
    """
    weights = {
        tensor.untyped_storage().data_ptr()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Keeping the storage alive prevents its address from being reused.
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del outputs
    return total


def convolution_outputs(module: nn.Module, call: Callable[[], Any]) -> int:
    """Returns how many numbers the convolutions of a module output in a call, which papers call activations."""
    total = 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel()

    handles = [
        part.register_forward_hook(count)
        for part in module.modules()
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return total
