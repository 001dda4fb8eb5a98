"""Reads the images to predict: arrays, tensors, PIL images, paths, URLs, and folders and sequences of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from panfpn_fast.data.images import (
    ImageArray,
    ImageReadError,
    ImageSource,
    find_images,
    read_image,
    to_rgb_array,
)
from panfpn_fast.inference.download import download_image, is_address

Source = ImageSource | Tensor
"""One image: uint8 RGB array [H, W, 3], uint8 RGB tensor [3, H, W], PIL image, path or address."""


class Photograph(NamedTuple):
    """An image that was read, uint8 RGB [H, W, 3], and where it comes from."""

    image: ImageArray
    source: str | None


def read_source(source: Source, name: str = "image", copy: bool = False) -> Photograph:
    """Reads one image.

    Args:
        source: The image; an address begins with http:// or https://.
        name: Name of the argument in error messages.
        copy: Whether to copy arrays and tensors, which the caller may change later.

    Raises:
        TypeError: If `source` has another type or dtype.
        ValueError: If an array is not [H, W, 3], or a tensor is not [3, H, W].
        OSError: If a file or an address cannot be read; the message names it.
    """
    if isinstance(source, Tensor):
        array = _tensor_array(source, name)
        return Photograph(array.copy() if copy else array, None)
    if is_address(source):
        return Photograph(download_image(str(source)), str(source))
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        raise ImageReadError(
            f"{name}: {os.fspath(source)} is a folder; pass the path of a file, or predict the images of the folder "
            "with predictor.stream(folder)"
        )
    if not isinstance(source, np.ndarray | Image.Image | str | os.PathLike):
        raise TypeError(
            f"{name}: expected a uint8 RGB array [H, W, 3], a uint8 RGB tensor [3, H, W], a PIL image, a path or an "
            f"address, got {type(source).__name__}"
        )
    image = to_rgb_array(source, name)
    if isinstance(source, Image.Image):
        return Photograph(image, getattr(source, "filename", "") or None)
    if isinstance(source, np.ndarray):
        return Photograph(image.copy() if copy else image, None)
    return Photograph(image, os.fspath(source))


def is_one_image(source: object) -> bool:
    """Whether an argument is one image, or something that `read_source` rejects; anything else holds several images."""
    if isinstance(source, str | os.PathLike):
        return is_address(source) or not os.path.isdir(source)
    if isinstance(source, np.ndarray | Tensor):
        return source.ndim != 4
    return isinstance(source, Image.Image) or not isinstance(source, Iterable)


def images_of(source: Source | Iterable[Source]) -> Iterable[Source]:
    """Returns the images of a source: of a folder its image files, which are not read yet.

    Raises:
        OSError: If a path does not exist.
        ValueError: If a folder has no images.
    """
    if is_one_image(source):
        if isinstance(source, str | os.PathLike) and not is_address(source) and not os.path.exists(source):
            read_image(source)  # raises the error, before a network is loaded
        return [source]  # type: ignore[list-item]
    if isinstance(source, str | os.PathLike):
        paths, problems = find_images([Path(source)])
        if problems:
            raise ValueError(f"source: {problems[0]}")
        return paths
    return source  # type: ignore[return-value]


def _tensor_array(tensor: Tensor, name: str) -> ImageArray:
    if tensor.dtype != torch.uint8:
        hint = "; (255 * tensor).round().byte() converts 0..1" if tensor.is_floating_point() else ""
        raise TypeError(f"{name}: expected dtype uint8 (0..255), got {tensor.dtype}{hint}")
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        hint = _shape_hint(tensor.shape)
        raise ValueError(
            f"{name}: expected a tensor of shape [3, H, W] with H, W >= 1, got {list(tensor.shape)}{hint}"
        )
    array: Any = tensor.detach().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array)


def _shape_hint(shape: Sequence[int]) -> str:
    """Returns how to convert a tensor to [3, H, W], or an empty text if its shape does not suggest a conversion."""
    if 0 in shape:
        return ""
    match tuple(shape):
        case (_, _, 3):
            return "; tensor.permute(2, 0, 1) moves the channels"
        case (_, _) | (1, _, _):
            return "; tensor.expand(3, -1, -1) makes three channels of a gray image"
        case (_, _, 4):
            return "; tensor[..., :3].permute(2, 0, 1) drops the alpha channel and moves the others"
        case (4, _, _):
            return "; tensor[:3] drops the alpha channel"
        case (1, 3, _, _):
            return "; tensor[0] is one image"
    return ""
