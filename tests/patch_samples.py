"""What the tests of patched frameworks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from panfpn_fast.integrations import patch
from panfpn_fast.integrations.patching import Framework


class Calls(TorchDispatchMode):
    """Counts the calls of our ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "panfpn_fast":
            self.ops[func._schema.name.removeprefix("panfpn_fast::")] += 1
        return func(*args, **(kwargs or {}))


def replace(framework: Framework, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What takes the place of a stand-in for the function whose target ends in `path`."""
    [replacement] = [known for known in framework.replacements if known.target.endswith(path)]
    return replacement.make(original)


def same(
    framework: str, call: Callable[[], Any], *served: str, agree: Callable[[Any, Any], None] | None = None
) -> None:
    """Demands that an installed framework gives the same with and without the patch, and that these ops served it."""
    with Calls() as calls:
        expected = call()
    assert not calls.ops, f"ours at work without the patch: {sorted(calls.ops)}"
    with patch(framework), Calls() as calls:
        got = call()
    assert set(calls.ops) == set(served), f"served by {sorted(calls.ops)}"
    (agree or torch.testing.assert_close)(got, expected)


def own(package: str) -> Callable[[type], type]:
    """Makes a stand-in's class pass for the package's own."""

    def mark(kind: type) -> type:
        kind.__module__ = f"{package}.stand_in"
        return kind

    return mark


def falls_back(replacement: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Demands that a replacement of `sentinel` hands a call on."""
    with Calls() as calls:
        assert replacement(*args, **kwargs) is sentinel
    assert not calls.ops


sentinel: Any = object()


def never(*args: Any, **kwargs: Any) -> Any:
    """An original that must not be called."""
    pytest.fail("the call was handed on")


def handed_on(*args: Any, **kwargs: Any) -> Any:
    """An original that says that it was called."""
    return sentinel
