"""Predicts the rows of a table and writes the maps to a folder, in processes that may be lost at any time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from panfpn_fast.inference.batch_predictor import BatchPredictor
from panfpn_fast.inference.map_files import check_name, write_maps

__all__ = ["PredictToFolder"]


class PredictToFolder(BatchPredictor):
    """Predicts batches like `BatchPredictor`, and writes the maps with `write_maps`.

    Engines such as Ray Data repeat the batch of a process that is lost, in Ray's case without end. This class counts in
    the folder how often an image was begun, so that an image that ends its process (for example because memory runs
    out) becomes an error instead of being tried forever.

    Args:
        model: Path or name of a checkpoint, or a network; see `BatchPredictor`.
        out: Folder to write to, which all machines share: `predictions/<name>.png`, and for each image in work a file
            in `attempts/`.
        images: The column with the images; see `BatchPredictor`.
        attempts: How often an image is begun at most.
        **predictor_arguments: Other arguments of `Predictor`.

    Raises:
        TypeError, ValueError, OSError: As `BatchPredictor`.
        ValueError: If `attempts` is below 1.

    Note:
        Images are predicted and written one by one. A batch that is repeated changes nothing that is written: the names
        and the contents of the files are the same.

    Example:
        >>> import tempfile
        >>> from panfpn_fast import PanopticFPN
        >>> rows = {"name": ["a", "b"], "image": [np.zeros((48, 64, 3), np.uint8), None]}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     predict = PredictToFolder(PanopticFPN(), out, images="image", device="cpu", short_edge=64)  # untrained
        ...     found = predict(rows)
        ...     sorted(os.listdir(f"{out}/predictions"))
        ['a.png']
        >>> [bool(error) for error in found["error"]]
        [False, True]
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        out: str | os.PathLike[str],
        images: str = "bytes",
        attempts: int = 3,
        **predictor_arguments: Any,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts: expected at least 1, got {attempts}")
        super().__init__(model, images, **predictor_arguments)
        self._out = Path(out)
        self._attempts = attempts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Predicts the images of a batch and writes their maps.

        Args:
            batch: Columns of equal length by name; `name` is the stem of the file to write, unique among all images.

        Returns:
            The columns that `BatchPredictor` returns, without `panoptic_png`.

        Raises:
            ValueError: If a column is missing or a name is not the name of a file.
            OSError: If a file cannot be written.
            ImportError: If the native ops did not load; the message contains a remedy.
        """
        self.check_columns(batch, "name")
        count = len(batch["name"])
        if count == 0:
            return write_maps(super().__call__(batch), self._out)
        rows = [self._row({name: values[i : i + 1] for name, values in batch.items()}) for i in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _row(self, row: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Predicts and writes one image, unless it was begun too often."""
        check_name(row["name"][0])
        tries = self._out / "attempts" / row["name"][0]
        tries.parent.mkdir(parents=True, exist_ok=True)
        begun = _size_of(tries)
        if begun >= self._attempts:
            tries.unlink(missing_ok=True)  # a later run may have more memory
            failed = self.without_results(
                row, f"ended its process {begun} times; its size may exceed the memory"
            )
            return write_maps(failed, self._out)
        with open(tries, "ab") as file:  # a byte for each attempt
            file.write(b".")
        found = write_maps(super().__call__(row), self._out)
        tries.unlink(missing_ok=True)
        return found


def _size_of(path: Path) -> int:
    """Returns the size of a file in bytes; 0 if it does not exist, or no more: another process may finish the image."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
