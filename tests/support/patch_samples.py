"""Helpers that the tests of patched frameworks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from panfpn_fast.integrations import patch
from panfpn_fast.integrations.patching import Framework


class Calls(TorchDispatchMode):
    """Counts calls by name: of panfpn_fast ops in `ops`, of torchvision ops in `torchvision_ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.torchvision_ops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        counter = {"panfpn_fast": self.ops, "torchvision": self.torchvision_ops}.get(func.namespace)
        if counter is not None:
            counter[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def replace(framework: Framework, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Creates the replacement for the target that ends in `path`, with a stand-in for the original function."""
    [replacement] = [known for known in framework.replacements if known.target.endswith(path)]
    return replacement.make(original)


def same(
    framework: str, call: Callable[[], Any], *served: str, agree: Callable[[Any, Any], None] | None = None
) -> None:
    """Asserts that a framework returns the same with and without the patch, which uses exactly the `served` ops."""
    with Calls() as calls:
        expected = call()
    assert not calls.ops, f"ops called without the patch: {sorted(calls.ops)}"
    with patch(framework), Calls() as calls:
        got = call()
    assert set(calls.ops) == set(served), f"ops called with the patch: {sorted(calls.ops)}"
    (agree or torch.testing.assert_close)(got, expected)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients by the names of their weights; weights without a gradient are left out."""
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


def same_step(got: Any, expected: Any) -> None:
    """Asserts equal losses and gradients, up to the rounding of a network whose sums are in a different order."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in got[1].items():
        largest = expected[1][name].abs().max().item()
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=1e-4 * largest + 1e-9)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pastes masks as both frameworks do; returns bool [N, height, width]."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    y = (torch.arange(size[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(size[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
    shape = (len(masks), *size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5


def framework_class(package: str) -> Callable[[type], type]:
    """Decorator that makes a stand-in's class look like a class of `package`."""

    def mark(kind: type) -> type:
        kind.__module__ = f"{package}.stand_in"
        return kind

    return mark


def falls_back(replacement: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Asserts that a replacement for `return_sentinel` calls it and no op."""
    with Calls() as calls:
        assert replacement(*args, **kwargs) is sentinel
    assert not calls.ops


sentinel: Any = object()


def never(*args: Any, **kwargs: Any) -> Any:
    """An original that must not be called."""
    pytest.fail("the replacement called the original")


def return_sentinel(*args: Any, **kwargs: Any) -> Any:
    """An original that returns `sentinel`."""
    return sentinel
