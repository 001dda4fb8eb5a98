"""Fixtures that tests in all folders share."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from hypothesis import settings

# Triton decides at its import whether kernels are interpreted, and it may be imported by torch.compile: so for the
# whole process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# CI repeats its examples, so that it judges the change at hand; elsewhere every run looks at new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _WITHOUT_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; those that are missing are skipped."""
    return torch.device(request.param)


@pytest.fixture
def torchvision_ops(device: torch.device) -> ModuleType:
    """torchvision.ops, where it is installed and its own binaries run on the device."""
    ops: ModuleType = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    try:
        ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torchvision's ops do not run on {device}: {str(error).splitlines()[0]}")
    return ops
