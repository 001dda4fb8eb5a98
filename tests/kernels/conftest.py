"""Fixtures for the tests of Triton kernels, which run on the GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from support.kernel_checks import implemented_in_triton
from support.poison import poisoned
from support.processes import environment, run


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Poisons fresh memory, see `poisoned`."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widens bfloat16 operands of tl.dot, whose bits Triton's interpreter would multiply as integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    float32 = importlib.import_module("triton.language").float32
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Returns the device for the kernels; without a GPU, tests/conftest.py makes Triton interpret them."""
    importlib.import_module("panfpn_fast.ops.triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 converts loop bounds with int(array), which NumPy 2.4 refuses for arrays of one element.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, scalar: Any) -> Any:
        handle = splat(self, shape, scalar)
        # Triton 3.9 would make integers of them, and does not accept integers as masks.
        if scalar.data.dtype == np.bool_:
            handle.data = handle.data.astype(np.bool_)
        return handle

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
    return torch.device("cpu")


@pytest.fixture
def triton_ops(kernel_device: torch.device) -> Iterator[torch.device]:
    """Makes the Triton host functions the implementations of their ops on the device that runs the kernels."""
    with implemented_in_triton(kernel_device) as called:
        yield kernel_device
    assert called, "no Triton op was called"


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Compiles the LAUNCHES of the test file, see support/compile_kernels.py."""
    command = [sys.executable, "-m", "support.compile_kernels", request.path]
    result = run(command, env=environment(TRITON_INTERPRET=None))
    report: dict[str, Any] = json.loads(result.stdout)
    return report
