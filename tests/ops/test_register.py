"""Importing the ops neither imports Triton nor touches CUDA; a call that needs a broken Triton reports the error."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function

from panfpn_fast.ops import _register
from support.processes import run

_IMPORT = """
import sys, torch

def touched(*args):
    raise AssertionError("CUDA was touched")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, touched)
torch._C._cuda_getDeviceCount = touched
import panfpn_fast.ops
import panfpn_fast.models
x = torch.randn(1, 16, 8, 8)
panfpn_fast.ops.conv_gn_relu_upsample(x, torch.randn(16, 16, 3, 3), torch.ones(16), torch.zeros(16), 4)
panfpn_fast.ops.upsample_argmax(x, 4)
assert "triton" not in sys.modules, "Triton was imported"
"""


def test_import_touches_neither_cuda_nor_triton() -> None:
    """A process that has initialised CUDA cannot fork workers that use it."""
    run([sys.executable, "-c", _IMPORT])


@pytest.fixture
def broken_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Triton that raises at its import; returns the names that have been imported."""
    imported: list[str] = []

    def import_module(name: str) -> Any:
        imported.append(name)
        raise OSError("could not get source code")

    monkeypatch.setattr(_register, "_triton_error", None)
    monkeypatch.setattr(importlib, "import_module", import_module)
    return imported


def test_a_broken_triton_is_reported_by_each_call(broken_triton: list[str]) -> None:
    call = _register._triton_stub("upsample_argmax")
    for _ in range(2):
        with pytest.raises(
            ImportError, match=r"(?s)upsample_argmax.*could not get source code.*pip install"
        ) as raised:
            call(torch.zeros(1))
        assert isinstance(raised.value.__cause__, OSError)
    assert broken_triton == ["panfpn_fast.ops.triton"]


def test_a_broken_triton_leaves_ops_opaque(broken_triton: list[str]) -> None:
    assert _register._kernels() == []


def test_every_triton_op_is_registered_for_cuda() -> None:
    implementations = pytest.importorskip(
        "panfpn_fast.ops.triton", reason="Triton is not installed"
    ).IMPLEMENTATIONS
    for name in implementations:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"panfpn_fast::{name}", "CUDA"), name
    assert not any(name.startswith("panfpn_fast_triton::") for name in torch._C._dispatch_get_all_op_names())


def test_torch_compile_sees_the_ops_of_a_python_implementation() -> None:
    """A package of AOTInductor for the CPU must not need Python: it calls the ops that have a C++ implementation."""
    nodes: list[str] = []

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = torch.ops.panfpn_fast.conv3x3_statistics(x, weight, 4, 1e-5)
        return results

    x, weight = torch.randn(1, 8, 5, 7), torch.randn(16, 8, 3, 3)
    traced = aot_function(function, fw_compiler=look)(x, weight)  # type: ignore[arg-type]
    assert "panfpn_fast.group_norm_statistics.default" in nodes
    assert "panfpn_fast.conv3x3_statistics.default" not in nodes
    for found, expected in zip(traced, function(x, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
