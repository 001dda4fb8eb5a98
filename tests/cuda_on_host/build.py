"""Compiles `.cu` files for the host run of the CUDA kernels (csrc/testing) and checks that nvcc takes them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

_FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
_FLAGS += ["-DPANFPN_CUDA_ON_HOST", "-I", str(CSRC)]
_NVCC_FLAGS = ["-std=c++20", "-arch=sm_90", "-Xcompiler=-Wall,-Wextra,-Werror", "--Werror=all-warnings"]
_NVCC_FLAGS += ["-I", str(CSRC)]


class CompileError(Exception):
    """The compiler's own words."""


def missing_for_host() -> str | None:
    """Why kernels cannot be compiled for the host here; None where they can."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    if not (CSRC / "testing").is_dir():
        return f"no C++ sources in {CSRC}: tests run outside a source tree"
    return None


def missing_for_nvcc() -> str | None:
    """Why kernels cannot be compiled by nvcc here; None where they can."""
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if not (CSRC / "ops").is_dir():
        return f"no C++ sources in {CSRC}: tests run outside a source tree"
    return None


def _compile(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def build_library(sources: Sequence[Path], folder: Path, flags: Sequence[str] = ()) -> Path:
    """Compiles kernels and the harness with g++ and links them.

    Args:
        sources: `.cu` files that include `ops/cuda/launch.cuh`.
        folder: where the object files and the library go.
        flags: added to each compilation and to the link, for instance `-fsanitize=address`.

    Returns:
        Path of the shared library.

    Raises:
        CompileError: when g++ refuses a file.
    """
    objects = []
    for source in [*sorted((CSRC / "testing").glob("*.cpp")), *sources]:
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        target = folder / f"{source.stem}.o"
        _compile(["g++", *_FLAGS, *flags, *language, "-c", source, "-o", target])
        objects.append(target)
    library = folder / "kernels.so"
    _compile(["g++", *flags, "-shared", *objects, "-o", library])
    return library


def compile_with_nvcc(source: Path, folder: Path) -> Path:
    """Compiles one `.cu` file for sm_90 with every warning an error; returns the object file."""
    target = folder / f"{source.stem}.nvcc.o"
    _compile(["nvcc", *_NVCC_FLAGS, "-c", source, "-o", target])
    return target


def sanitizer_runtime(name: str) -> str:
    """Path of a sanitizer's library, to be preloaded into a process that was built without it."""
    done = subprocess.run(
        ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
