"""Builds the two native libraries with CMake; pyproject.toml holds everything else.

Environment variables:
  PANFPN_CUDA           unset: build the CUDA ops if nvcc is found; 1: fail if it is not found; 0: do not build them
  CUDA_HOME, CUDA_PATH  directory of the CUDA toolkit
  TORCH_CUDA_ARCH_LIST  architectures to build for, in torch's notation: "8.0;9.0+PTX"
  MAX_JOBS              number of parallel compiler processes
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
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

if not sys.platform.startswith("linux"):
    sys.exit(f"panfpn_fast: only Linux is supported (also in WSL 2), this is {sys.platform}")


def environment() -> dict[str, str]:
    """Returns the environment variables for cmake, with this Python's scripts first on PATH if cmake is one of them.

    So the build works in an environment that is not activated. An isolated build has its tools first on PATH already.
    """
    spec = importlib.util.find_spec("cmake")
    if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(sys.prefix):
        return dict(os.environ)
    return os.environ | {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"}


def package_dir(name: str) -> Path:
    """Returns the directory of an installed package without importing it: torch takes seconds and may need a driver."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"panfpn_fast: the build needs {name}, which is not installed. Remove --no-build-isolation, or run: "
            f"pip install {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_nvcc() -> tuple[Path | None, list[str]]:
    """Returns the CUDA compiler, or None, and the places that were searched."""
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
    """Returns the nvcc that builds the CUDA ops, or None to skip them. Prints the decision in one line."""
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
                f"panfpn_fast: PANFPN_CUDA=1 requires the CUDA ops, but {message}. Install the CUDA toolkit 12.8 or "
                "newer and set CUDA_HOME to its directory, or unset PANFPN_CUDA to build the CPU ops only."
            )
        print(f"panfpn_fast: not building the CUDA ops because {message}")
    else:
        print(f"panfpn_fast: building the CUDA ops with {nvcc}")
    return nvcc


class CleanBuild(build_py):
    """Collects the Python files in an empty folder.

    Otherwise a second build in the same checkout would install modules that are gone, and a CUDA library that this
    build does not make.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "panfpn_fast"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds both libraries with one run of CMake."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        nvcc = cuda_compiler()
        # pip has deleted the programs of an earlier isolated build, which the old cache names: ninja, for example.
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
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
            sys.exit(f"panfpn_fast: MAX_JOBS: expected an integer of at least 1, got {jobs!r}")
        build.mkdir(parents=True, exist_ok=True)
        for step, command in (
            ("configuring", configure),
            ("compiling", ["cmake", "--build", str(build), "-j", jobs]),
        ):
            try:
                subprocess.run(command, env=environment(), check=True)
            except FileNotFoundError:
                sys.exit(
                    "panfpn_fast: cmake was not found. Remove --no-build-isolation, or run: pip install cmake ninja"
                )
            except subprocess.CalledProcessError as error:
                sys.exit(
                    f"panfpn_fast: {step} failed (cmake exited with {error.returncode}); see the first error above. "
                    "The build needs a C++20 compiler (g++ 11 or newer). PANFPN_CUDA=0 skips the CUDA ops."
                )

    def copy_extensions_to_source(self) -> None:
        """Copies `_C_cuda.so` too, which setuptools does not know as an extension, for editable installs."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "panfpn_fast", "_C_cuda.so").resolve()
        target = ROOT / "panfpn_fast" / built.name
        if built.is_file() and built != target:
            shutil.copyfile(built, target)


setup(
    ext_modules=[Extension("panfpn_fast._C", sources=[])],
    cmdclass={"build_py": CleanBuild, "build_ext": CMakeBuild},
)
