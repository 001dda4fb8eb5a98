"""Importing needs no compiler, no GPU, no triton and no binaries; a missing binary is told by the first op call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import panfpn_fast
from panfpn_fast import _load

PACKAGE = Path(panfpn_fast.__file__).parent


def run_python(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{script}"],
        cwd=path,
        env={"PATH": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_needs_neither_compiler_nor_triton(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['torchvision'] = None\n"
        "import torch, panfpn_fast\n"
        "for name in panfpn_fast.__all__: getattr(panfpn_fast, name)\n"
        "assert panfpn_fast.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)"
    )
    result = run_python(script, tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_alone_is_light(tmp_path: Path) -> None:
    script = "import panfpn_fast, sys, json; print(json.dumps('torch' in sys.modules))"
    result = run_python(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) is False


def test_the_ops_import_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import torch, sys, json; before = set(sys.modules)\nimport panfpn_fast.ops\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    result = run_python(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert not {"torchvision", "triton", "PIL", "tqdm", "scipy"} & set(json.loads(result.stdout))


@pytest.fixture
def package_without_binaries(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "panfpn_fast", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def test_first_op_call_tells_why_there_are_no_ops(package_without_binaries: Path) -> None:
    script = (
        "import torch\nfrom panfpn_fast import ops, PanopticFPN, load\n"
        "try: ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except ImportError as error: print(error)"
    )
    result = run_python(script, package_without_binaries)
    assert result.returncode == 0, result.stderr
    assert "No module named 'panfpn_fast._C'" in result.stdout
    assert "holds no binaries" in result.stdout
    assert "pip install" in result.stdout


def test_a_broken_binary_keeps_its_first_error(package_without_binaries: Path) -> None:
    module = next(PACKAGE.glob("_C.*"))
    (package_without_binaries / "panfpn_fast" / module.name).write_bytes(b"not a library")
    script = (
        "import torch\nfrom panfpn_fast import ops\n"
        "try: ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except ImportError as error: print(error)"
    )
    result = run_python(script, package_without_binaries)
    assert result.returncode == 0, result.stderr
    assert module.name in result.stdout
    assert "Reinstall" in result.stdout


def test_cuda_without_cuda_ops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_cuda_error", "built without nvcc")
    with pytest.raises(ImportError, match="no CUDA ops: built without nvcc"):
        _load.native(torch.device("cuda"))


def test_other_devices_take_the_reference() -> None:
    assert _load.native(torch.device("cpu"))
    assert not _load.native(torch.device("xpu"))
    assert not _load.native(torch.device("mps"))
