"""The libraries use only PyTorch's stable C ABI, so that one build works with every PyTorch version from 2.11 on.

The symbols of the libraries also keep fused and unfused arithmetic apart.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import panfpn_fast
from support.processes import run

LIBRARIES = sorted(Path(panfpn_fast.__file__).parent.glob("_C*.so"))

# Symbols of PyTorch's C++ libraries. Those in at:: and c10:: change with every release.
UNSTABLE = re.compile(r"\b(at|c10|caffe2|torch)::")
# The inline namespaces of csrc/arithmetic.h.
ARITHMETIC = re.compile(r"\bpanfpn::(fused|unfused)::")


def symbols(library: Path, *options: str) -> list[str]:
    """Lists the demangled symbols of a library, without their addresses and types."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    listed = run([nm, *options, "--demangle", library]).stdout
    return [re.sub(r"^[0-9a-f]*\s+\S ", "", line) for line in listed.splitlines()]


def test_cpu_library_exists() -> None:
    assert any(library.name.startswith("_C.") for library in LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_no_unstable_symbols(library: Path) -> None:
    undefined = symbols(library, "--dynamic", "--undefined-only")
    assert any("aoti_torch_" in symbol for symbol in undefined), (
        "the library uses no symbol of PyTorch's C ABI; is it a library of panfpn_fast?"
    )
    assert not [symbol for symbol in undefined if UNSTABLE.search(symbol)]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_only_the_module_is_exported(library: Path) -> None:
    """An exported C++ symbol could be bound to the symbol of another library in the same process."""
    exported = symbols(library, "--dynamic", "--defined-only")
    assert not [name for name in exported if "panfpn::" in name and "typeinfo" not in name]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_fused_and_unfused_arithmetic_share_no_symbol(library: Path) -> None:
    """Fused and unfused sources include the same templates; the linker would merge instances of one name."""
    ours = [name for name in symbols(library, "--defined-only") if "panfpn::" in name]
    if not ours:
        pytest.skip("the library is stripped")
    found = {match.group(1) for name in ours for match in ARITHMETIC.finditer(name)}
    assert found == ({"fused", "unfused"} if library.name.startswith("_C.") else {"unfused"})
    assert not [name for name in ours if len({match.group(1) for match in ARITHMETIC.finditer(name)}) != 1]
    # Names such as panfpn::unfused::f are the only ones with panfpn:: in them.
    assert not [name for name in ours if "panfpn::" in ARITHMETIC.sub("", name)]
