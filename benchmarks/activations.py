"""What a network keeps in memory: for its backward pass, and the outputs of its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(modules: list[nn.Module], forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps at the end of a forward pass: the memory of activations in training.

    Args:
        modules: Whose parameters and buffers do not count.
        forward: Returns what would be differentiated.

    Returns:
        The sizes of the storages, each once, however many operations keep it.
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
            # Holding it keeps its address from being used again.
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del outputs
    return total


def convolution_outputs(module: nn.Module, call: Callable[[], Any]) -> int:
    """Numbers that the convolutions of a module make in a call: what papers count as activations."""
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
