"""Predicts the images in one column of a table, for engines that process tables on many machines, such as Ray Data."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from panfpn_fast._device import is_out_of_memory
from panfpn_fast._errors import one_line
from panfpn_fast.data.images import ImageArray, read_image_bytes
from panfpn_fast.inference.coco_writer import MapPng, origin_of
from panfpn_fast.inference.predictor import Predictor
from panfpn_fast.inference.result import PanopticResult
from panfpn_fast.inference.sources import read_source

__all__ = ["BatchPredictor"]

_ADDED = ("panoptic_png", "segments", "error")


class BatchPredictor:
    """Predicts batches of a table: takes columns by name, and returns columns.

    It is a callable class, as `map_batches` of Ray Data takes it: each process makes one object, which loads the
    network, and calls it for many batches. It does not depend on Ray.

    Args:
        model: A network, or the path or name of a checkpoint, as `Predictor` takes it. Give a path or a name if the
            object is made in another process, so that the network is not sent there.
        images: The column with the images: the bytes of image files (JPEG, PNG and so on), uint8 RGB arrays [H, W, 3],
            or paths, which must exist on all machines.
        batch_size: Images per pass through the network. With 1, a result does not depend on the batch of its image, so
            that it is the same when an engine repeats a part of the work with other batches.
        **predictor_arguments: Other arguments of `Predictor`, such as `short_edge`. `instances` is "panoptic" by
            default. Without `device`, each process takes the first GPU that it sees, and engines show each its own.

    Attributes:
        predictor: The `Predictor`.

    Raises:
        TypeError, ValueError, OSError: As `Predictor`.
        ValueError: If `batch_size` is below 1.

    Example:
        >>> from panfpn_fast import PanopticFPN
        >>> predict = BatchPredictor(PanopticFPN(), device="cpu", short_edge=64)  # untrained
        >>> found = predict({"name": ["a"], "bytes": [b"not an image"]})
        >>> list(found), found["error"].tolist()
        (['name', 'panoptic_png', 'segments', 'error'], ['bytes[0]: cannot be decoded: not an image in a known format'])
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        images: str = "bytes",
        batch_size: int = 1,
        **predictor_arguments: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self._column = images
        self._batch_size = batch_size
        self.predictor = Predictor(model, **{"instances": "panoptic", **predictor_arguments})

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Predicts the images of a batch.

        Args:
            batch: Columns of equal length by name: arrays or lists. `name` (unique among all images) and `source` (file
                name of the image) go into the PNG, if they are there, and from there into the JSON.

        Returns:
            The other columns of the batch, those with paths of images too, and three more. None of them has nulls.

            - `panoptic_png`: bytes of a PNG in COCO's panoptic format, which also contains the segments, as those of
              `CocoPanopticWriter`; empty after an error.
            - `segments`: the field `segments_info` of COCO's panoptic format as JSON; "[]" after an error.
            - `error`: why the image could not be read or did not fit in memory; empty if it was predicted.

        Raises:
            ValueError: If the batch has no column of images, or has columns of these names.
            ImportError: If the native ops did not load; the message contains a remedy.
        """
        self.check_columns(batch)
        values = batch[self._column]
        found: list[PanopticResult | str] = []
        for start in range(0, len(values), self._batch_size):
            places = range(start, min(start + self._batch_size, len(values)))
            read = [_read(values[place], f"{self._column}[{place}]") for place in places]
            results = iter(self._predict([image for image in read if not isinstance(image, str)]))
            found += [image if isinstance(image, str) else next(results) for image in read]
        return self._with_results(batch, found)

    def check_columns(self, batch: Mapping[str, Any], *others: str) -> None:
        """Checks that a batch has the column of images and others, and none of those that are added."""
        for column in (self._column, *others):
            if column not in batch:
                raise ValueError(f"batch: expected a column {column!r}, got {', '.join(batch) or 'none'}")
        taken = [column for column in _ADDED if column in batch]
        if taken:
            raise ValueError(f"batch: expected no column {taken[0]!r}, which is added; rename it before")

    def without_results(self, batch: Mapping[str, Any], error: str) -> dict[str, npt.NDArray[Any]]:
        """Returns what a call returns if all images of the batch fail with an error."""
        return self._with_results(batch, [error] * len(batch[self._column]))

    def _with_results(
        self, batch: Mapping[str, Any], found: Sequence[PanopticResult | str]
    ) -> dict[str, npt.NDArray[Any]]:
        images = batch[self._column]
        encoded = [
            (b"", "[]") if isinstance(one, str) else _encode(one, batch, images[place], place)
            for place, one in enumerate(found)
        ]
        kept = {
            name: column if isinstance(column, np.ndarray) else _objects(column)
            for name, column in batch.items()
            if name != self._column or all(isinstance(image, str) for image in images)
        }
        return {
            **kept,
            "panoptic_png": _objects([png for png, _ in encoded]),
            "segments": _objects([segments for _, segments in encoded]),
            "error": _objects([one if isinstance(one, str) else "" for one in found]),
        }

    def _predict(self, images: list[ImageArray]) -> Sequence[PanopticResult | str]:
        """Predicts images in one pass, or one by one if they do not fit in memory together."""
        try:
            return self.predictor(images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(images) == 1:
                return [f"not enough memory on {self.predictor.device}; try a smaller short_edge"]
        return [found for image in images for found in self._predict([image])]


def _encode(result: PanopticResult, batch: Mapping[str, Any], image: Any, place: int) -> tuple[bytes, str]:
    """Returns the PNG of a result with the segments in it, and the segments as JSON."""
    path = image if isinstance(image, str) else None
    name = str(batch["name"][place]) if "name" in batch else ""
    source = str(batch["source"][place]) if "source" in batch else os.path.basename(path or name)
    png = MapPng(result, name, source, origin_of(path))
    with io.BytesIO() as file:
        png.picture.save(file, format="PNG", pnginfo=png.info)
        return file.getvalue(), json.dumps(png.entry.segments_info)


def _read(value: Any, name: str) -> ImageArray | str:
    """Reads an image; returns why it cannot be read as text."""
    try:
        if isinstance(value, bytes | bytearray | memoryview):
            return read_image_bytes(bytes(value), name)
        # Engines pass arrays in memory that cannot be written to, of which torch warns.
        return read_source(value, name, copy=True).image
    except (OSError, ValueError, TypeError) as error:
        return one_line(error)


def _objects(values: Sequence[Any]) -> npt.NDArray[Any]:
    """Returns a column; NumPy's own type for bytes would drop zeros at the end."""
    column = np.empty(len(values), object)
    for place, value in enumerate(values):  # a slice would make several columns of sequences
        column[place] = value
    return column
