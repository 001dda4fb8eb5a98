"""Loads the native libraries and remembers why one did not load.

Importing panfpn_fast never fails for want of a binary. The first error is kept, and raised with its remedy by the
first call of an op that needs the library.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_PACKAGE = Path(__file__).resolve().parent
_F = TypeVar("_F", bound=Callable[..., Any])


def _load_cpu() -> str | None:
    """Imports `_C`, which registers every schema and the CPU ops; returns what went wrong."""
    try:
        importlib.import_module("panfpn_fast._C")
    except ImportError as error:
        if not any(_PACKAGE.glob("_C.*")):
            remedy = (
                f"{_PACKAGE} holds no binaries. If this is the source folder, leave it or run `pip install -e .` "
                "in it; else reinstall the package."
            )
        else:
            remedy = (
                f"It was built for another Python or needs torch >= 2.11 (here: Python "
                f"{platform.python_version()}, torch {torch.__version__}). Reinstall with: "
                "pip install --force-reinstall --no-deps ."
            )
        return f"{error}\n{remedy}"
    return None


def _load_cuda() -> str | None:
    """Loads `_C_cuda`; returns why the CUDA ops are not there."""
    library = _PACKAGE / "_C_cuda.so"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not library.is_file():
        return (
            "panfpn_fast was built without nvcc. Install the CUDA toolkit, set CUDA_HOME, and reinstall with "
            "PANFPN_CUDA=1, which says what is missing."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} did not load: {error}"
    return None


_cpu_error = _load_cpu()
_cuda_error = "the CPU ops did not load" if _cpu_error is not None else _load_cuda()


_triton_error: str | None = "they were not loaded"


def load_triton() -> None:
    """Imports the Triton kernels where there is a GPU for them; keeps what went wrong."""
    global _triton_error
    if _cpu_error is not None or not torch.cuda.is_available():
        _triton_error = _cpu_error or "torch finds no CUDA GPU here"
        return
    try:
        importlib.import_module("panfpn_fast.kernels")
    except ImportError as error:
        _triton_error = f"{error}\ntorch's CUDA builds bring Triton along; else: pip install triton"
    else:
        _triton_error = None


def native(device: torch.device) -> bool:
    """Whether an op on this device is native; devices that have no native ops take the reference.

    Raises:
        ImportError: The native library for the device should be there and is not; says why and what to do.
    """
    if _cpu_error is not None:
        raise ImportError(f"panfpn_fast: the native ops did not load: {_cpu_error}")
    if device.type == "cuda" and _cuda_error is not None:
        raise ImportError(f"panfpn_fast: there are no CUDA ops: {_cuda_error}")
    return device.type in ("cpu", "cuda", "meta")


def semantic_ops(device: torch.device) -> Any:
    """The namespace with the semantic head's ops for a device: C++ on the CPU, Triton on CUDA, or None: the reference.

    Raises:
        ImportError: The ops for the device should be there and are not; says why and what to do.
    """
    if device.type == "cuda":
        if _triton_error is not None:
            raise ImportError(f"panfpn_fast: there are no Triton kernels: {_triton_error}")
        return torch.ops.panfpn_fast_triton
    return torch.ops.panfpn_fast if native(device) else None


def register_fake(op: str) -> Callable[[_F], _F]:
    """torch.library.register_fake for an op of ours; does nothing where the ops did not load."""
    if _cpu_error is not None:
        return lambda function: function
    return torch.library.register_fake(f"panfpn_fast::{op}")


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """torch.library.register_autograd for an op of ours; does nothing where the ops did not load."""
    if _cpu_error is None:
        torch.library.register_autograd(f"panfpn_fast::{op}", backward, setup_context=setup_context)


def block_double_backward(op: str) -> None:
    """Makes backward through `<op>_backward` an error, where torch by itself would warn and give none."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"panfpn_fast.ops.{op} has no second derivative; detach its gradient")

    register_autograd(f"{op}_backward", backward)


def build_report() -> dict[str, str]:
    """What is installed, what it was built with, what loaded and why the rest did not."""
    from panfpn_fast import __version__

    report = {
        "panfpn_fast": __version__,
        "installed in": str(_PACKAGE),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none",
    }
    if _cpu_error is None:
        from panfpn_fast import _C

        build = _C.build_info()
        report["compiler"] = build["compiler"]
        report["torch headers"] = build["torch_headers"]
        report["CUDA toolkit"] = build["cuda_toolkit"] or "none: built without CUDA ops"
        report["CUDA architectures"] = build["cuda_architectures"] or "none"
    report["CPU ops"] = "loaded" if _cpu_error is None else f"not loaded: {_cpu_error}"
    report["CUDA ops"] = "loaded" if _cuda_error is None else f"not loaded: {_cuda_error}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["GPUs"] = ", ".join(gpus) or "none visible"
    return report
