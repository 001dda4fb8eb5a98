"""Compares tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Requires the same names, and under each name the same values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
