"""Reads the images to predict: arrays, tensors, PIL images, and what has a name: files, folders, videos, cameras."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from panfpn_fast.data import images
from panfpn_fast.data.images import ImageArray, ImageReadError, ImageSource, to_rgb_array
from panfpn_fast.inference.download import download_image, downloaded, is_address
from panfpn_fast.inference.finding import (
    Place,
    camera_number,
    find_source,
    is_video,
    names_several,
)
from panfpn_fast.inference.video import VideoFrame, read_camera, read_video

Source = ImageSource | Tensor
"""One image: uint8 RGB array [H, W, 3], uint8 RGB tensor [3, H, W], PIL image, path or address."""


class Photograph(NamedTuple):
    """An image that was read, and where it comes from.

    Attributes:
        image: uint8 RGB [H, W, 3].
        source: Path, address or camera; None if the image has none.
        frame: Number of the frame in its video or file, from 1; None if there are no others.
        time: Seconds after the first frame of its video; None for other images.
    """

    image: ImageArray
    source: str | None
    frame: int | None = None
    time: float | None = None


def read_source(source: Source, name: str = "image", copy: bool = False, bgr: bool = False) -> Photograph:
    """Reads one image.

    Args:
        source: The image; an address begins with http:// or https://. Of a file with several frames, the first one.
        name: Name of the argument in error messages.
        copy: Whether to copy arrays and tensors, which the caller may change later.
        bgr: Whether the channels of arrays and tensors are blue, green and red, as OpenCV has them.

    Raises:
        TypeError: If `source` has another type or dtype.
        ValueError: If an array is not [H, W, 3], or a tensor is not [3, H, W].
        OSError: If a file or an address cannot be read; the message names it.
    """
    if isinstance(source, Tensor):
        array = _tensor_array(source, name)
        return Photograph(_rgb(array, copy, bgr), None)
    if isinstance(source, str | os.PathLike) and (names_several(source) or is_video(source)):
        raise ImageReadError(
            f"{name}: {os.fspath(source)} is {_kind(source)}; pass the path of an image, or predict its images with "
            f"predictor.stream({_argument(source)})"
        )
    if is_address(source):
        return Photograph(download_image(str(source)), str(source))
    if not isinstance(source, np.ndarray | Image.Image | str | os.PathLike):
        raise TypeError(
            f"{name}: expected a uint8 RGB array [H, W, 3], a uint8 RGB tensor [3, H, W], a PIL image, a path or an "
            f"address, got {type(source).__name__}"
        )
    image = to_rgb_array(source, name)
    if isinstance(source, Image.Image):
        return Photograph(image, getattr(source, "filename", "") or None)
    if isinstance(source, np.ndarray):
        return Photograph(_rgb(image, copy, bgr), None)
    return Photograph(image, os.fspath(source))


def read_frames(source: str | os.PathLike[str], every: int = 1) -> Iterator[Photograph]:
    """Reads the images of a file, an address or a camera one by one.

    Args:
        source: An image file, also a GIF, TIFF, APNG, WebP or AVIF with several frames; a video file; the address of
            one of these; or a camera such as "camera:0".
        every: Yields each `every`-th frame of a video or a camera, beginning with the first one.

    Returns:
        An iterator over the images with their source, number and time. `Predictor.stream` takes it.

    Raises:
        ValueError: If `every` is below 1.
        ImportError: If a video or a camera needs PyAV and it is not installed.
        OSError: If the source cannot be read, at the image that is damaged; the message names it.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".gif") as file:
        ...     frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
        ...     frames[0].save(file.name, save_all=True, append_images=frames[1:])
        ...     [(frame.frame, frame.image.shape) for frame in read_frames(file.name)]
        [(1, (6, 8, 3)), (2, (6, 8, 3))]
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every: expected a positive integer, got {every!r}")
    return _read_frames(source, every)


def _read_frames(source: str | os.PathLike[str], every: int) -> Iterator[Photograph]:
    text = os.fspath(source)
    number = camera_number(source)
    if number is not None:
        yield from _of_video(read_camera(number, every), text)
    elif is_address(text):
        with downloaded(text) as path:
            if is_video(text):
                yield from _of_video(read_video(path, every), text)
            else:
                yield from (Photograph(image, text, frame) for frame, image in images.read_frames(path))
    elif is_video(source):
        yield from _of_video(read_video(source, every), text)
    else:
        yield from (Photograph(image, text, frame) for frame, image in images.read_frames(source))


def _of_video(frames: Iterable[VideoFrame], source: str) -> Iterator[Photograph]:
    for image, number, time in frames:
        yield Photograph(image, source, number, float(time))


def is_one_image(source: object) -> bool:
    """Whether an argument is one image, or something that `read_source` rejects; anything else holds several images.

    Raises:
        OSError: If it is the path of a file that cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        if names_several(source) or is_video(source):
            return False
        return is_address(source) or not images.has_frames(source)
    if isinstance(source, np.ndarray | Tensor):
        return source.ndim != 4
    return isinstance(source, Image.Image) or not isinstance(source, Iterable)


def photographs_of(source: Source | Iterable[Source | Photograph], bgr: bool = False) -> Iterator[Photograph]:
    """Reads the images of a source one by one, when they are needed.

    Args:
        source: An image, or what has a name and holds several: a folder, a pattern, a file with several frames, a
            video, a camera, or "-" for the paths in the standard input; or an iterable of these.
        bgr: As for `read_source`.

    Raises:
        OSError, ValueError, ImportError: At once, if a named source is missing, a folder or a pattern has no images, or
            a video needs PyAV; later, as `read_source` and `read_frames`.
    """
    if isinstance(source, str | os.PathLike):
        return _of_places(find_source(source))
    if isinstance(source, np.ndarray | Tensor | Image.Image) and is_one_image(source):
        return iter([read_source(source, "source", copy=True, bgr=bgr)])
    if not isinstance(source, Iterable):
        read_source(source)  # raises the error for another type
    return _of_iterable(source, bgr)  # type: ignore[arg-type]


def _of_places(places: Sequence[Place]) -> Iterator[Photograph]:
    for place in places:
        yield from _read_frames(place, 1)


def _of_iterable(sources: Iterable[Source | Photograph], bgr: bool) -> Iterator[Photograph]:
    for number, source in enumerate(sources):
        if isinstance(source, Photograph):
            yield source
        elif isinstance(source, str | os.PathLike):
            yield from _of_places(find_source(source))
        else:
            yield read_source(source, f"sources[{number}]", copy=True, bgr=bgr)


def _kind(source: str | os.PathLike[str]) -> str:
    """Returns what a source with several images is."""
    if os.path.isdir(source):
        return "a folder"
    if camera_number(source) is not None:
        return "a camera"
    return "a video" if is_video(source) else "a pattern or a list"


def _argument(source: str | os.PathLike[str]) -> str:
    return "folder" if os.path.isdir(source) else repr(os.fspath(source))


def _rgb(array: ImageArray, copy: bool, bgr: bool) -> ImageArray:
    if bgr:
        return np.ascontiguousarray(array[..., ::-1])
    return array.copy() if copy else array


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
