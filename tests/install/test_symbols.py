"""The libraries keep to torch's stable C ABI: that is why one build serves every torch from 2.11 on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import panfpn_fast

LIBRARIES = sorted(Path(panfpn_fast.__file__).parent.glob("_C*.so"))

# What the dynamic linker would have to find in torch's C++ libraries. at:: and c10:: change with every release.
UNSTABLE = re.compile(r"\b(at|c10|caffe2|torch)::")


def undefined_symbols(library: Path) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    listed = subprocess.run(
        [nm, "--dynamic", "--undefined-only", "--demangle", library],
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]


def test_the_cpu_library_is_there() -> None:
    assert any(library.name.startswith("_C.") for library in LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_no_unstable_symbols(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert any("aoti_torch_" in symbol for symbol in symbols), (
        "no symbol of torch's C ABI: is this our library?"
    )
    assert not [symbol for symbol in symbols if UNSTABLE.search(symbol)]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_nothing_but_the_module_is_exported(library: Path) -> None:
    """Exported C++ symbols could be bound to those of another library in the same process."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    listed = subprocess.run(
        [nm, "--dynamic", "--defined-only", "--demangle", library], capture_output=True, text=True, check=True
    )
    exported = [line.split(maxsplit=2)[2] for line in listed.stdout.splitlines()]
    assert not [name for name in exported if "panfpn::" in name and "typeinfo" not in name]
