"""Exports a network as a program that needs nothing of this package but its ops, or as an ONNX file."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree

from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.checkpoints.native import description_of
from panfpn_fast.models.padded import PaddedPanopticFPN
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.ops._checks import check_int, int_pair

FORMATS = ("export", "aoti", "onnx")
"""File formats: an archive of torch.export, a package of AOTInductor and an ONNX file."""

PROGRAMS = ("export", "aoti")
"""The formats that run in PyTorch."""

_SUFFIXES = {"export": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}

DESCRIPTION = "panfpn_fast"
"""Name of the description: `panfpn_fast.json` among an archive's extra files, `panfpn_fast` in others' metadata."""


def export(
    model: PanopticFPN,
    path: str | os.PathLike[str],
    size: tuple[int, int] | None,
    *,
    batch: int = 1,
    output_size: tuple[int, int] | None = None,
    formats: Sequence[str] = PROGRAMS,
    max_candidates: int = 4096,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Exports a network: to `NAME.pt2` with torch.export, to `NAME.aoti.pt2` with AOTInductor, to `NAME.onnx` as ONNX.

    All of them take uint8 RGB images [batch, 3, height, width] and return the same tensors as `PaddedPanopticFPN`, the
    ONNX file as outputs with the names of the dictionary. Each file contains a description in JSON: the configuration
    of the network, the names of its classes, the input and the outputs.

    Args:
        model: Network on the device and in the dtype in which the program will run; for ONNX in float32, on any device.
            Put in evaluation mode in place.
        path: NAME, or NAME with the suffix of a format. Missing folders are made.
        size: Height and width of the network's input images: resized, without padding. None for images of any size,
            which only ONNX files take.
        batch: Number of images.
        output_size: Height and width of the results; None for the size of the images.
        formats: One or more of "export", "aoti" and "onnx".
        max_candidates: See `PaddedPanopticFPN`.
        options: Settings of AOTInductor, by their names in torch._inductor.config.

    Returns:
        The paths of the files, in the order of `formats`. Each file appears under its name only when it is complete.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an unsupported value.
        ImportError: If ONNX is wanted and the extra [onnx] is not installed.
        RuntimeError: If AOTInductor finds no C++ compiler.
        OSError: If a file cannot be written.

    Note:
        An archive is a graph of PyTorch and panfpn_fast ops; its results equal those of the eager network. A package is
        compiled code for the processor or GPU of this machine and takes minutes to compile; its results differ by
        rounding. An ONNX file has standard operators alone, from the images to the panoptic map, and needs neither
        PyTorch nor this package; its results differ by rounding, too.

    Example:
        >>> import tempfile
        >>> import panfpn_fast
        >>> model = panfpn_fast.PanopticFPN(backbone="resnet10_narrow", tasks=("semantic",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path] = export(model, f"{folder}/model", (64, 96), formats=["export"])
        ...     program = torch.export.load(path).module()
        >>> program(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))["panoptic"].shape
        torch.Size([1, 64, 96])
    """
    if not isinstance(model, PanopticFPN):
        raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}")
    if size is not None:
        size = int_pair("size", size, 1)
    check_int("batch", batch)
    if batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch}")
    paths = prepare(path, formats)
    if size is None and set(formats) != {"onnx"}:
        raise ValueError(
            f"size: expected (height, width) for {', '.join(PROGRAMS)}, got None, which only onnx takes"
        )
    if "onnx" in formats and model.dtype != torch.float32:
        raise ValueError(
            f"model: expected torch.float32 for onnx, got {model.dtype}; engines choose their own dtype as they load"
        )
    network = PaddedPanopticFPN(model.eval(), output_size, max_candidates)
    program: ExportedProgram | None = None
    for kind, target in paths.items():
        if kind == "onnx":
            _write_onnx(network, size, batch, target)
            continue
        if program is None:
            assert size is not None
            images = torch.zeros(batch, 3, *size, dtype=torch.uint8, device=model.device)
            with torch.no_grad():
                program = torch.export.export(network, (images,), strict=False)
            description = json.dumps(_describe(model, program))
        with atomic_write(target) as file:
            if kind == "export":
                torch.export.save(program, file, extra_files={f"{DESCRIPTION}.json": description})
            else:
                metadata = {"aot_inductor.metadata": {DESCRIPTION: description}}
                torch._inductor.aoti_compile_and_package(
                    program, package_path=file, inductor_configs={**(options or {}), **metadata}
                )
    return list(paths.values())


def _write_onnx(network: PaddedPanopticFPN, size: tuple[int, int] | None, batch: int, target: Path) -> None:
    # It imports onnxscript, which is in an extra.
    from panfpn_fast.inference.onnx_model import convert, trace

    program = trace(network, size, batch)
    outputs = list(_outputs(program))
    description = {**_describe(network.model, program), "device": "any"}
    content = convert(network, size, program, outputs, {DESCRIPTION: json.dumps(description)})
    with atomic_write(target) as file:
        file.write(content)


def prepare(path: str | os.PathLike[str], formats: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """Checks what an export needs besides the network, and makes missing folders.

    Args:
        path: NAME, or NAME with the suffix of a format.
        formats: One or more of "export", "aoti" and "onnx".

    Returns:
        The paths of the files by their formats.

    Raises:
        ValueError: If an argument has an unsupported value.
        ImportError: If ONNX is wanted and the extra [onnx] is not installed.
        RuntimeError: If AOTInductor finds no C++ compiler.
        OSError: If a file cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if isinstance(formats, str) or unknown or not formats:
        raise ValueError(f"formats: expected a list of names among {', '.join(FORMATS)}, got {formats!r}")
    name = os.fspath(path).removesuffix(".onnx").removesuffix(".pt2").removesuffix(".aoti")
    if not os.path.basename(name):
        raise ValueError(f"path: expected the path of a file without suffix, got {os.fspath(path)!r}")
    paths = {kind: Path(name + suffix) for kind, suffix in _SUFFIXES.items()}
    for kind in formats:
        prepare_file(paths[kind], "path")
    if "aoti" in formats and compiler() is None:
        raise RuntimeError("AOTInductor needs a C++ compiler: install g++, or set CXX to one")
    if "onnx" in formats:
        for module in ("onnx", "onnxscript"):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(
                    f'{error}. ONNX files need the extra [onnx]: run pip install ".[onnx]" in the checkout of '
                    "panfpn_fast"
                ) from error
    return {kind: paths[kind] for kind in formats}


def compiler() -> str | None:
    """Returns the C++ compiler that AOTInductor would use, or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _describe(model: PanopticFPN, program: ExportedProgram) -> dict[str, Any]:
    [images] = _values(program, program.graph_signature.user_inputs)
    return {
        **description_of(model.config),
        "input": {**_shape(images), "content": "RGB, 0..255, resized and not normalised"},
        "outputs": {name: _shape(value) for name, value in _outputs(program).items()},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def _outputs(program: ExportedProgram) -> dict[str, Tensor]:
    """Returns the fake tensors that a program returns."""
    values = _values(program, program.graph_signature.user_outputs)
    found: dict[str, Tensor] = _pytree.tree_unflatten(values, program.call_spec.out_spec)
    return found


def _values(program: ExportedProgram, names: Sequence[Any]) -> list[Tensor]:
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [nodes[name] for name in names]


def _shape(value: Tensor) -> dict[str, Any]:
    """Describes a tensor; null stands for a side that is not fixed."""
    shape = [side if isinstance(side, int) else None for side in value.shape]
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
