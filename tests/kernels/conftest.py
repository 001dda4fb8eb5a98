"""Fixtures of the tests of Triton kernels: on the GPU where there is one, else interpreted on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from poison import poisoned

from panfpn_fast import _load

COMPILER = Path(__file__).resolve().parents[1] / "compile_kernels.py"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """See `poison.poisoned`."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widens bfloat16 for tl.dot, where Triton's interpreter multiplies the bits as if they were integers."""
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
    """Where the kernels run; tests/conftest.py has Triton interpret them where there is no GPU."""
    importlib.import_module("panfpn_fast.kernels")
    if torch.cuda.is_available():
        return torch.device("cuda")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 reads the bounds of loops with int(array), which numpy 2.4 refuses for arrays of one element.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, scalar: Any) -> Any:
        handle = splat(self, shape, scalar)
        if (
            scalar.data.dtype == np.bool_
        ):  # of which Triton 3.9 makes integers, and then takes no masks of them
            handle.data = handle.data.astype(np.bool_)
        return handle

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
    return torch.device("cpu")


@pytest.fixture
def triton_ops(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Makes the public functions, forward and backward, call the Triton ops on whatever device."""
    calls = 0

    def semantic_ops(device: torch.device) -> Any:
        nonlocal calls
        calls += 1
        return torch.ops.panfpn_fast_triton

    monkeypatch.setattr(_load, "semantic_ops", semantic_ops)
    yield kernel_device
    assert calls > 0, "no Triton op was called"


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the LAUNCHES of the test file compile to, see compile_kernels.py."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILER), str(request.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report
