"""Writes a network as a program that runs without this package's Python modules: the ops are all it needs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch.export import ExportedProgram

from panfpn_fast.checkpoints.own import description_of
from panfpn_fast.checkpoints.writer import categories_of
from panfpn_fast.inference.coco_format import atomic_write
from panfpn_fast.models.padded import PaddedPanopticFPN
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.ops._checks import check_int, int_pair

FORMATS = ("export", "aoti")
"""What may be written: an archive of torch.export, and a package of AOTInductor."""

DESCRIPTION = "panfpn_fast"
"""What the description is called: `panfpn_fast.json` among an archive's extra files, and so in a package's metadata."""


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
    """Writes a network for images of one size: `NAME.pt2` for torch.export, `NAME.aoti.pt2` for AOTInductor.

    Either takes uint8 RGB images [batch, 3, height, width] and returns the dictionary of tensors that
    `PaddedPanopticFPN` does. Each file says what is in it, in JSON: the settings of the network, the names of its
    classes, the input and the outputs.

    Args:
        model: A network on the device and in the dtype that it shall run in. It is put in evaluation mode in place.
        path: NAME, or NAME.pt2.
        size: Height and width of the images as the network should see them: resized, without padding.
        batch: How many images there are.
        output_size: Height and width of the results; None for those of the images.
        formats: "export", "aoti" or both.
        max_candidates: See `PaddedPanopticFPN`.
        options: Settings of AOTInductor by the names of torch._inductor.config.

    Returns:
        The paths of the files, in the order of `formats`. Each is written beside and renamed when it is complete.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a value that it cannot take.
        RuntimeError: There is no C++ compiler, which AOTInductor needs.
        OSError: A file cannot be written.

    Note:
        An archive is a graph of PyTorch's and our ops, with the eager network's results. A package is compiled
        code for this kind of processor, or GPU, and takes minutes to make; its results differ by rounding.

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
    unknown = [name for name in formats if name not in FORMATS]
    if isinstance(formats, str) or unknown or not formats:
        raise ValueError(f"formats: expected some of {', '.join(FORMATS)}, got {formats!r}")
    if "aoti" in formats and compiler() is None:
        raise RuntimeError("AOTInductor needs a C++ compiler: install g++, or set CXX to one")
    network = PaddedPanopticFPN(model.eval(), output_size, max_candidates)
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=model.device)
    with torch.no_grad():
        program = torch.export.export(network, (images,), strict=False)
    description = json.dumps(_describe(model, images, program))
    name = os.fspath(path).removesuffix(".pt2").removesuffix(".aoti")
    paths = {"export": Path(f"{name}.pt2"), "aoti": Path(f"{name}.aoti.pt2")}
    for kind in formats:
        with atomic_write(paths[kind]) as file:
            if kind == "export":
                torch.export.save(program, file, extra_files={f"{DESCRIPTION}.json": description})
            else:
                metadata = {"aot_inductor.metadata": {DESCRIPTION: description}}
                torch._inductor.aoti_compile_and_package(
                    program, package_path=file, inductor_configs={**(options or {}), **metadata}
                )
    return [paths[kind] for kind in formats]


def compiler() -> str | None:
    """Returns the C++ compiler that AOTInductor would use, or None."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _describe(model: PanopticFPN, images: torch.Tensor, program: ExportedProgram) -> dict[str, Any]:
    with torch.no_grad():
        found = program.module()(images)
    return {
        **description_of(dataclasses.asdict(model.config), categories_of(model.config)),
        "input": {**_shape(images), "content": "RGB, 0..255, resized and not normalised"},
        "outputs": {name: _shape(value) for name, value in found.items()},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
    }


def _shape(value: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
