"""Builds the two native libraries with CMake; pyproject.toml holds everything else.

What it reads from the environment:
  PANFPN_CUDA           unset: CUDA ops where nvcc is found; 1: an error where it is not; 0: never
  CUDA_HOME, CUDA_PATH  where the CUDA toolkit lies
  TORCH_CUDA_ARCH_LIST  architectures to build, as torch spells them: "8.0;9.0+PTX"
  MAX_JOBS              compilers at once
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """This process's, with its Python's own tools first on PATH where cmake is installed beside it.

    So that nobody needs to have activated the environment; an isolated build brings its tools first on PATH itself.
    """
    spec = importlib.util.find_spec("cmake")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(sys.prefix):
        return dict(os.environ)
    return os.environ | {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"}


def package_dir(name: str) -> Path:
    """Where an installed package lies, found without importing it: torch takes seconds and may want a driver."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"panfpn_fast: building needs {name}, which is not installed here. Leave out --no-build-isolation, "
            f"or run: pip install {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_nvcc() -> tuple[Path | None, list[str]]:
    """The CUDA compiler, and every place that was searched."""
    searched = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            searched.append(f"${variable}={root}")
            if (nvcc := Path(root, "bin", "nvcc")).is_file():
                return nvcc, searched
    searched.append("$PATH")
    if found := shutil.which("nvcc"):
        return Path(found), searched
    searched.append("/usr/local/cuda")
    if (nvcc := Path("/usr/local/cuda/bin/nvcc")).is_file():
        return nvcc, searched
    return None, searched


def cuda_compiler() -> Path | None:
    """The nvcc to build the CUDA ops with, or None; says which in one line."""
    wanted = os.environ.get("PANFPN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"panfpn_fast: PANFPN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        print("panfpn_fast: not building the CUDA ops because PANFPN_CUDA=0")
        return None
    nvcc, searched = find_nvcc()
    if nvcc is None:
        message = f"nvcc was not found (searched {', '.join(searched)})"
        if wanted == "1":
            sys.exit(
                f"panfpn_fast: PANFPN_CUDA=1 asks for the CUDA ops, but {message}. Install the CUDA toolkit 12.8 or "
                "newer and set CUDA_HOME to it, or unset PANFPN_CUDA to build the CPU ops alone."
            )
        print(f"panfpn_fast: not building the CUDA ops because {message}")
    else:
        print(f"panfpn_fast: building the CUDA ops with {nvcc}")
    return nvcc


class CMakeBuild(build_ext):
    """Runs CMake once for both libraries."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        nvcc = cuda_compiler()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPANFPN_VERSION={self.distribution.get_version()}",
            f"-DPANFPN_TORCH_DIR={package_dir('torch')}",
            f"-DPANFPN_PYBIND11_INCLUDE={package_dir('pybind11') / 'include'}",
            f"-DPANFPN_OUTPUT_DIR={out.parent}",
            f"-DPANFPN_MODULE_NAME={out.name}",
            f"-DPANFPN_BUILD_CUDA={'ON' if nvcc else 'OFF'}",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not jobs.isdecimal() or int(jobs) < 1:
            sys.exit(f"panfpn_fast: MAX_JOBS: expected a number of at least 1, got {jobs!r}")
        build.mkdir(parents=True, exist_ok=True)
        for step, command in (
            ("configuring", configure),
            ("compiling", ["cmake", "--build", str(build), "-j", jobs]),
        ):
            try:
                subprocess.run(command, env=environment(), check=True)
            except FileNotFoundError:
                sys.exit(
                    "panfpn_fast: cmake was not found. Leave out --no-build-isolation, or: pip install cmake ninja"
                )
            except subprocess.CalledProcessError as error:
                sys.exit(
                    f"panfpn_fast: {step} failed (cmake exited with {error.returncode}); the first error above tells "
                    "why. A C++20 compiler (g++ 11 or newer) is needed; PANFPN_CUDA=0 leaves the CUDA ops out."
                )


setup(ext_modules=[Extension("panfpn_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
