"""Exports a network as a program that needs the ops of this package, but none of its other Python modules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch.export import ExportedProgram

from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.checkpoints.native import description_of
from panfpn_fast.models.padded import PaddedPanopticFPN
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.ops._checks import check_int, int_pair

FORMATS = ("export", "aoti")
"""File formats: an archive of torch.export and a package of AOTInductor."""

DESCRIPTION = "panfpn_fast"
"""Name of the description: `panfpn_fast.json` among an archive's extra files, `panfpn_fast` in a package's metadata."""


def export(
    model: PanopticFPN,
    path: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    batch: int = 1,
    output_size: tuple[int, int] | None = None,
    formats: Sequence[str] = FORMATS,
    max_candidates: int = 4096,
    options: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Exports a network for images of one size: to `NAME.pt2` with torch.export, to `NAME.aoti.pt2` with AOTInductor.

    Both programs take uint8 RGB images [batch, 3, height, width] and return the same dictionary of tensors as
    `PaddedPanopticFPN`. Each file contains a description in JSON: the configuration of the network, the names of its
    classes, the input and the outputs.

    Args:
        model: Network on the device and in the dtype in which the program will run. Put in evaluation mode in place.
        path: NAME or NAME.pt2. Missing folders are made.
        size: Height and width of the network's input images: resized, without padding.
        batch: Number of images.
        output_size: Height and width of the results; None for `size`.
        formats: "export", "aoti" or both.
        max_candidates: See `PaddedPanopticFPN`.
        options: Settings of AOTInductor, by their names in torch._inductor.config.

    Returns:
        The paths of the files, in the order of `formats`. Each file appears under its name only when it is complete.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an unsupported value.
        RuntimeError: If AOTInductor finds no C++ compiler.
        OSError: If a file cannot be written.

    Note:
        An archive is a graph of PyTorch and panfpn_fast ops; its results equal those of the eager network. A package is
        compiled code for the processor or GPU of this machine and takes minutes to compile; its results differ by
        rounding.

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
    height, width = int_pair("size", size, 1)
    check_int("batch", batch)
    if batch < 1:
        raise ValueError(f"batch: expected an integer of at least 1, got {batch}")
    paths = prepare(path, formats)
    network = PaddedPanopticFPN(model.eval(), output_size, max_candidates)
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=model.device)
    with torch.no_grad():
        program = torch.export.export(network, (images,), strict=False)
    description = json.dumps(_describe(model, images, program))
    for kind, target in paths.items():
        with atomic_write(target) as file:
            if kind == "export":
                torch.export.save(program, file, extra_files={f"{DESCRIPTION}.json": description})
            else:
                metadata = {"aot_inductor.metadata": {DESCRIPTION: description}}
                torch._inductor.aoti_compile_and_package(
                    program, package_path=file, inductor_configs={**(options or {}), **metadata}
                )
    return list(paths.values())


def prepare(path: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> dict[str, Path]:
    """Checks what an export needs besides the network, and makes missing folders.

    Args:
        path: NAME or NAME.pt2.
        formats: "export", "aoti" or both.

    Returns:
        The paths of the files by their formats.

    Raises:
        ValueError: If an argument has an unsupported value.
        RuntimeError: If AOTInductor finds no C++ compiler.
        OSError: If a file cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if isinstance(formats, str) or unknown or not formats:
        raise ValueError(f"formats: expected a list of names among {', '.join(FORMATS)}, got {formats!r}")
    name = os.fspath(path).removesuffix(".pt2").removesuffix(".aoti")
    if not os.path.basename(name):
        raise ValueError(f"path: expected the path of a file without suffix, got {os.fspath(path)!r}")
    paths = {"export": Path(f"{name}.pt2"), "aoti": Path(f"{name}.aoti.pt2")}
    for kind in formats:
        prepare_file(paths[kind], "path")
    if "aoti" in formats and compiler() is None:
        raise RuntimeError("AOTInductor needs a C++ compiler: install g++, or set CXX to one")
    return {kind: paths[kind] for kind in formats}


def compiler() -> str | None:
    """Returns the C++ compiler that AOTInductor would use, or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _describe(model: PanopticFPN, images: torch.Tensor, program: ExportedProgram) -> dict[str, Any]:
    with torch.no_grad():
        found = program.module()(images)
    return {
        **description_of(model.config),
        "input": {**_shape(images), "content": "RGB, 0..255, resized and not normalised"},
        "outputs": {name: _shape(value) for name, value in found.items()},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def _shape(value: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
