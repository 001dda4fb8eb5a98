"""Importing needs no compiler, GPU, Triton or binaries; the first op call reports a missing binary."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import panfpn_fast
from panfpn_fast import _load
from support.processes import ROOT, environment, run

PACKAGE = Path(panfpn_fast.__file__).parent


def run_python(script: str, path: Path) -> str:
    """Runs a script that can import from `path`, without a compiler and without a GPU; returns what it prints."""
    paths = environment()["PYTHONPATH"].split(os.pathsep)
    env = {
        "PATH": "/nonexistent",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(path), *paths]),
    }
    return run([sys.executable, "-c", script], env=env).stdout


def test_import_needs_neither_compiler_nor_triton(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['torchvision'] = None\n"
        "import torch, panfpn_fast\n"
        "for name in panfpn_fast.__all__: getattr(panfpn_fast, name)\n"
        "assert panfpn_fast.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)"
    )
    run_python(script, tmp_path)


def test_import_alone_is_light(tmp_path: Path) -> None:
    script = "import panfpn_fast, sys, json; print(json.dumps('torch' in sys.modules))"
    printed = run_python(script, tmp_path)
    assert json.loads(printed) is False


def test_ops_import_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import torch, sys, json; before = set(sys.modules)\nimport panfpn_fast.ops\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    printed = run_python(script, tmp_path)
    assert not {"torchvision", "triton", "PIL", "tqdm", "scipy"} & set(json.loads(printed))


def test_public_names_after_the_import_alone(tmp_path: Path) -> None:
    script = (
        "import panfpn_fast\n"
        "print(panfpn_fast.metrics.pq_compute.__module__, panfpn_fast.export.__module__)\n"
        "print(set(panfpn_fast.__all__) >= {'export', 'metrics'})"
    )
    lines = run_python(script, tmp_path).splitlines()
    assert lines == ["panfpn_fast.metrics.panoptic_quality panfpn_fast.inference.export", "True"]


@pytest.fixture
def package_without_binaries(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "panfpn_fast", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def test_first_op_call_reports_why_ops_are_missing(package_without_binaries: Path) -> None:
    script = (
        # The finder of an editable install would supply the binaries of the checkout.
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import torch\nfrom panfpn_fast import ops, PanopticFPN, load\n"
        "try: ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except ImportError as error: print(error)"
    )
    printed = run_python(script, package_without_binaries)
    assert "No module named 'panfpn_fast._C'" in printed
    assert "contains no binaries" in printed
    assert "pip install" in printed


def test_a_broken_binary_keeps_its_first_error(package_without_binaries: Path) -> None:
    module = next(PACKAGE.glob("_C.*so"))
    (package_without_binaries / "panfpn_fast" / module.name).write_bytes(b"not a library")
    script = (
        # The finder of an editable install would supply the binaries of the checkout.
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import torch\nfrom panfpn_fast import ops\n"
        "try: ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except ImportError as error: print(error)"
    )
    printed = run_python(script, package_without_binaries)
    assert module.name in printed
    assert "Reinstall" in printed


def test_missing_cuda_ops_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_cuda_error", "built without nvcc")
    with pytest.raises(ImportError, match="no CUDA ops: built without nvcc"):
        _load.native(torch.device("cuda"))


@pytest.mark.parametrize(
    ("driver", "toolkit", "words"),
    [
        (12080, "13.0.88", "they were built with CUDA 13.0.88, but the driver supports CUDA 12.8 at most"),
        (11040, "12.8.93", "set CUDA_HOME to a toolkit of CUDA 11"),
        (12020, "12.8.93", None),  # minor versions are compatible
        (13000, "12.8.93", None),
        (13000, "13.1.0", None),
        (0, "13.0.88", None),  # a machine without a driver
        (12080, "", None),
    ],
)
def test_driver_older_than_the_toolkit(driver: int, toolkit: str, words: str | None) -> None:
    found = _load._too_old_driver(driver, toolkit)
    assert found is None if words is None else found is not None and words in found


def test_driver_is_compared_at_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C_cuda.so").touch()
    monkeypatch.setattr(_load, "_PACKAGE", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(
        importlib.import_module("panfpn_fast._C"), "build_info", lambda: {"cuda_toolkit": "13.0.88"}
    )
    monkeypatch.setattr(_load, "_driver_version", lambda: 12040)
    error = _load._load_cuda()
    assert error is not None
    assert "Update the NVIDIA driver" in error
    monkeypatch.setattr(_load, "_driver_version", lambda: 13000)
    assert _load._load_cuda() is None


def test_driver_version_is_read_without_initialising_cuda(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom panfpn_fast import _load\n"
        "print(_load._driver_version(), torch.cuda.is_initialized())"
    )
    version, initialised = run_python(script, tmp_path).split()
    assert int(version) > 0 or not torch.cuda.is_available()
    assert initialised == "False"


def test_amd_gpus_use_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not _load.native(torch.device("cuda"))
    assert not _load.native(torch.device("cuda"), in_triton=True)
    assert _load.native(torch.device("cpu"))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused_in_one_line(platform: str) -> None:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("there is no setup.py next to tests/: it cannot be run")
    script = (
        "import runpy, sys, setuptools.command.build_ext\n"
        f"sys.platform = {platform!r}\nsys.argv = ['setup.py', '--version']\nrunpy.run_path('setup.py')"
    )
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    done = run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == f"panfpn_fast: only Linux is supported (also in WSL 2), this is {platform}\n"


def test_other_devices_use_the_reference() -> None:
    assert _load.native(torch.device("cpu"))
    assert not _load.native(torch.device("xpu"))
    assert not _load.native(torch.device("mps"))
