"""Prepares the process for the tests, and defines fixtures that all tests share."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from support.processes import ROOT

# `python -m pytest` puts the checkout on sys.path. Without binaries there, the package to test is the installed one.
if not any((ROOT / "panfpn_fast").glob("_C.*so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if importlib.util.find_spec("panfpn_fast") is None:
        raise pytest.UsageError(
            'panfpn_fast is not installed in this environment; run: pip install ".[test]"'
        )

# pytest has read its options. They, such as a report's name, must not reach the runs of pytest that tests start.
for _name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
    os.environ.pop(_name, None)

# A shell starts background jobs with SIGINT ignored, and so would be the processes to which tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The environment's own cmake and ninja come first, also where the environment is not activated.
_SCRIPTS = sysconfig.get_path("scripts")
if Path(_SCRIPTS, "cmake").exists():
    os.environ["PATH"] = os.pathsep.join((_SCRIPTS, os.environ.get("PATH", os.defpath)))

# Triton decides at its import whether kernels are interpreted. torch.compile may import it in any test, so the whole
# process has one setting.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# In CI, hypothesis repeats its examples, so that a failure is due to the change at hand; elsewhere it tries others.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Features that differ between versions of torch and Triton: compiled and exported graphs, custom ops, Triton itself.
_VERSIONED = re.compile(
    r"\btorch\.(compile|export|library|_dynamo|_inductor)\b|\brun_op_checks\(|\b_register\b"
    r"|\bimport triton\b|importorskip\(.triton"
)

_WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")


@functools.cache
def _shared_source(module: ModuleType) -> str:
    """Returns the source of a test file without its test functions."""
    source = inspect.getsource(module)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test"):
            source = source.replace(inspect.getsource(function), "")
    return source


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests whose source uses features that differ between versions of torch and Triton."""
    for item in items:
        if isinstance(item, pytest.Function):
            source = inspect.getsource(item.function) + _shared_source(item.module)
            if _VERSIONED.search(source):
                item.add_marker("torch_versions")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _WITHOUT_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Returns each device in turn; tests on a missing device are skipped."""
    return torch.device(request.param)


@pytest.fixture
def torchvision_ops(device: torch.device) -> ModuleType:
    """Returns torchvision.ops, or skips the test if it is not installed or its binaries do not run on the device."""
    ops: ModuleType = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    try:
        ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torchvision's ops do not run on {device}: {str(error).splitlines()[0]}")
    return ops


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread, for workloads so small that more threads would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
