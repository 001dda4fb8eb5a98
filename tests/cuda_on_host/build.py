"""Compiles `.cu` files with g++ for the host run of the CUDA kernels (csrc/testing), and with nvcc."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from support.processes import run

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
# Names a library that build_ops has made; set for a child process that runs tests with it.
OPS_VARIABLE = "PANFPN_HOST_OPS"
# The orders of threads in the host run, as in csrc/testing/scheduler.h.
ORDERS = {"forward": 0, "reverse": 1, "random": 2}

_FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
_FLAGS += ["-DPANFPN_CUDA_ON_HOST", "-I", str(CSRC)]
_NVCC_FLAGS = ["-std=c++20", "-arch=sm_90", "-Xcompiler=-Wall,-Wextra,-Werror", "--Werror=all-warnings"]
_NVCC_FLAGS += ["-I", str(CSRC)]


class CompileError(Exception):
    """A compiler rejected a file; the message is the command and its output."""


def missing_for_host() -> str | None:
    """Returns the reason why kernels cannot be compiled for the host here, or None if they can."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    if not (CSRC / "testing").is_dir():
        return f"no C++ sources in {CSRC}: the tests do not run in a source tree"
    return None


def missing_for_nvcc() -> str | None:
    """Returns the reason why kernels cannot be compiled with nvcc here, or None if they can."""
    if shutil.which("nvcc") is None:
        return "no nvcc on PATH"
    if not (CSRC / "ops").is_dir():
        return f"no C++ sources in {CSRC}: the tests do not run in a source tree"
    return None


def _compile(command: Sequence[object]) -> None:
    done = run(command, check=False)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def missing_for_ops() -> str | None:
    """Returns the reason why build_ops() cannot work here, or None if it can."""
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            return f"{program} is not installed: the kernels cannot be compiled for the host"
    return missing_for_host()


def cached_folder(name: str, config: pytest.Config, temporary: pytest.TempPathFactory) -> Path:
    """Returns a build directory in pytest's cache, so that the next run compiles only changed sources."""
    cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`
    name = f"{name}-torch-{torch.__version__}"
    return temporary.mktemp(name) if cache is None else cache.mkdir(name)


def build_ops(folder: Path, *options: str) -> Path:
    """Builds `_C_cuda_on_host.so`: all CUDA ops, compiled for the CPU.

    Args:
        folder: Build directory.
        *options: Additional options of CMake, for example `-DPANFPN_RACE_CHECK=ON`.

    Returns:
        The path of the library.
    """
    torch_dir = Path(torch.__file__).parent
    # Fresh: an earlier configuration may name another checkout, or the programs of a deleted environment.
    run(["cmake", "--fresh", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DPANFPN_BUILD_CUDA_ON_HOST=ON",
         f"-DPANFPN_TORCH_DIR={torch_dir}", *options])  # fmt: skip
    run(["cmake", "--build", folder])
    return folder / "_C_cuda_on_host.so"


def build_library(
    sources: Sequence[Path], folder: Path, flags: Sequence[str] = (), kernel_flags: Sequence[str] = ()
) -> Path:
    """Compiles kernels and the harness with g++ and links them into a shared library.

    Args:
        sources: `.cu` files that include `ops/cuda/launch.cuh`.
        folder: Directory for the object files and the library.
        flags: Additional flags for each compilation and for the link, for example `-fsanitize=address`.
        kernel_flags: Additional flags for the compilation of `sources` alone.

    Returns:
        The path of the shared library.

    Raises:
        CompileError: If g++ rejects a file.
    """
    objects = []
    for source in [*sorted((CSRC / "testing").glob("*.cpp")), *sources]:
        of_kernels = [*kernel_flags, "-x", "c++"] if source.suffix == ".cu" else []
        target = folder / f"{source.stem}.o"
        _compile(["g++", *_FLAGS, *flags, *of_kernels, "-c", source, "-o", target])
        objects.append(target)
    library = folder / "kernels.so"
    _compile(["g++", *flags, "-shared", *objects, "-o", library])
    return library


def compile_with_nvcc(source: Path, folder: Path) -> Path:
    """Compiles one `.cu` file for sm_90 with all warnings as errors; returns the path of the object file."""
    target = folder / f"{source.stem}.nvcc.o"
    _compile(["nvcc", *_NVCC_FLAGS, "-c", source, "-o", target])
    return target


def link_with_nvcc(source: Path, folder: Path) -> Path:
    """Compiles and links a program for sm_90; returns its path."""
    target = folder / source.stem
    _compile(["nvcc", *_NVCC_FLAGS, source, "-o", target])
    return target


def sanitizer_runtime(name: str) -> str:
    """Returns the path of a sanitizer's library, for preloading into a process that was built without it."""
    return run(["g++", f"-print-file-name=lib{name}.so"]).stdout.strip()
