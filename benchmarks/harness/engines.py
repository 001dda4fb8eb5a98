"""Inference engines for the CPU that run a module of PyTorch: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .measuring import bfloat16_problem

Compiled = Callable[..., tuple[Tensor, ...]]

_MODULES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}

NAMES = tuple(_MODULES)


@functools.cache
def problem(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Returns why an engine cannot be timed, or None if it can."""
    if device.type != "cpu":
        return f"{name} is compared on the CPU only"
    if dtype == torch.bfloat16 and name == "ONNX Runtime":
        return "ONNX Runtime has no bfloat16 convolutions on the CPU"
    if dtype == torch.bfloat16 and bfloat16_problem(device) is not None:
        return bfloat16_problem(device)
    for module in (_MODULES[name], "onnx", "onnxscript"):  # torch's exporter needs the last two
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f'{name} needs the extra [bench-engines]: pip install ".[bench-engines]" ({error})'
    return None


def compile_module(
    name: str, module: nn.Module, example: Tensor, *, rows: bool = False, dtype: torch.dtype = torch.float32
) -> Compiled:
    """Exports a module to ONNX and compiles it for all of torch's threads.

    Args:
        name: The engine, one of `NAMES`.
        module: A module in float32 that takes one tensor and returns a tuple of tensors.
        example: A float32 input.
        rows: Whether the first dimension of the input varies.
        dtype: The dtype to compute in; inputs and outputs are float32 in any case.

    Returns:
        The compiled function. Its results may share memory that the next call overwrites.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _COMPILERS[name](export(module, example, Path(folder), rows=rows), dtype)


def export(module: nn.Module, example: Tensor, folder: Path, *, rows: bool = False) -> Path:
    """Writes a module as ONNX to a directory and returns the file; the arguments are those of `compile_module`."""
    path = folder / "module.onnx"
    varying: Any = ({0: torch.export.Dim("rows", min=1)},) if rows else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=varying, verbose=False)
    return path


def _onnx_runtime(path: Path, dtype: torch.dtype) -> Compiled:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [argument] = session.get_inputs()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return _tensors(session.run(None, {argument.name: x.contiguous().numpy()}))

    return call


def openvino_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the settings to compile with: one image at a time, on all of torch's threads."""
    return {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }


def _openvino(path: Path, dtype: torch.dtype) -> Compiled:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", openvino_settings(dtype))

    def call(x: Tensor) -> tuple[Tensor, ...]:
        found = compiled(x.contiguous().numpy(), share_inputs=True, share_outputs=True)
        return _tensors(found[output] for output in compiled.outputs)

    return call


_COMPILERS: dict[str, Callable[[Path, torch.dtype], Compiled]] = {
    "ONNX Runtime": _onnx_runtime,
    "OpenVINO": _openvino,
}


def _tensors(arrays: Any) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shared arrays are read-only
        return tuple(map(torch.from_numpy, arrays))
