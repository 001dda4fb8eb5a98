"""Loads the native libraries and keeps the errors of those that do not load.

Importing panfpn_fast does not fail if a binary is missing. The error is kept, and calls of ops that need the library
raise it with a remedy.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from pathlib import Path

import torch

from panfpn_fast._version import version

_PACKAGE = Path(__file__).resolve().parent


def _load_cpu() -> str | None:
    """Imports `_C`, which registers all schemas and the CPU ops; returns the error, if any."""
    try:
        importlib.import_module("panfpn_fast._C")
    except ImportError as error:
        if not any(_PACKAGE.glob("_C.*so")):
            remedy = (
                f"{_PACKAGE} contains no binaries. If this is the source directory, run Python in another directory, "
                "or run `pip install -e .` there; otherwise reinstall the package."
            )
        else:
            remedy = (
                f"It was built for another Python, or torch is older than 2.11 (this is Python "
                f"{platform.python_version()}, torch {torch.__version__}). Reinstall with: "
                "pip install --force-reinstall --no-deps ."
            )
        return f"{error}\n{remedy}"
    return None


def _too_old_driver(driver: int, toolkit: str) -> str | None:
    """Returns why a driver cannot run what a CUDA toolkit has compiled, with a remedy; None if it can.

    A driver runs programs of all toolkits of its own major version and of older ones.

    Args:
        driver: The newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.
        toolkit: Version of the toolkit, such as "13.0.88".
    """
    major = toolkit.partition(".")[0]
    if driver == 0 or not major.isdecimal() or driver // 1000 >= int(major):
        return None
    return (
        f"they were built with CUDA {toolkit}, but the driver supports CUDA {driver // 1000}.{driver % 1000 // 10} at "
        f"most. Update the NVIDIA driver, or set CUDA_HOME to a toolkit of CUDA {driver // 1000} and reinstall "
        "panfpn_fast with PANFPN_CUDA=1."
    )


def _driver_version() -> int:
    """Returns the newest CUDA version that the driver supports; 0 without a driver. Does not initialize CUDA."""
    found = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return 0
    return found.value


def _load_cuda() -> str | None:
    """Loads `_C_cuda`; returns the reason if there are no CUDA ops."""
    library = _PACKAGE / "_C_cuda.so"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not library.is_file():
        return (
            "panfpn_fast was built without nvcc. Install the CUDA toolkit, set CUDA_HOME, and reinstall with "
            "PANFPN_CUDA=1, which reports what is missing."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} did not load: {error}"
    toolkit = importlib.import_module("panfpn_fast._C").build_info()["cuda_toolkit"]
    return _too_old_driver(_driver_version(), toolkit)


_cpu_error = _load_cpu()
_cuda_error = "the CPU ops did not load" if _cpu_error is not None else _load_cuda()


def native(device: torch.device, in_triton: bool = False) -> bool:
    """Whether an op has an implementation for a device. On other devices the reference computes it.

    Args:
        device: The device of the op's tensors.
        in_triton: Whether Triton kernels implement the op on CUDA, so that it does not need the CUDA library.

    Raises:
        ImportError: If the native library for the device is missing; gives the reason and a remedy.
    """
    if _cpu_error is not None:
        raise ImportError(f"panfpn_fast: the native ops did not load: {_cpu_error}")
    if torch.version.hip is not None and device.type == "cuda":  # torch's name for an AMD GPU
        return False
    if device.type == "cuda" and _cuda_error is not None and not in_triton:
        raise ImportError(f"panfpn_fast: there are no CUDA ops: {_cuda_error}")
    return device.type in ("cpu", "cuda", "meta")


def build_report() -> dict[str, str]:
    """Returns versions, build settings, and for each library whether it loaded or why it did not."""
    report = {
        "panfpn_fast": version(),
        "installed in": str(_PACKAGE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none",
    }
    if _cpu_error is None:
        build = importlib.import_module("panfpn_fast._C").build_info()
        report["compiler"] = build["compiler"]
        report["torch headers"] = build["torch_headers"]
        report["CUDA toolkit"] = build["cuda_toolkit"] or "none: built without CUDA ops"
        report["CUDA architectures"] = build["cuda_architectures"] or "none"
    report["CPU ops"] = "loaded" if _cpu_error is None else f"not loaded: {_cpu_error}"
    report["CUDA ops"] = "loaded" if _cuda_error is None else f"not loaded: {_cuda_error}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["GPUs"] = ", ".join(gpus) or "none visible"
    return report
