"""Reads Cityscapes, street scenes with gtFine annotations, in the directory layout of its archives."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from panfpn_fast.data.categories import get_categories
from panfpn_fast.data.files import DataError, check_folder, check_same_size, read_label_map
from panfpn_fast.data.images import read_image
from panfpn_fast.data.sample import Sample

# Labels are 0..33; labels without a category are not evaluated.
_LABELS = 34
_IMAGE_END, _TRUTH_END = "_leftImg8bit.png", "_gtFine_instanceIds.png"


class CityscapesDataset:
    """The images of one split and their fine annotations.

    Args:
        root: The directory that contains leftImg8bit and gtFine.
        split: "train", "val", or the name of another subdirectory.

    Raises:
        MissingFileError: If the directory of the images or of the annotations does not exist.
        DataError: If the directory has no images.

    Note:
        Reads `leftImg8bit/<split>/<city>/<name>_leftImg8bit.png` and
        `gtFine/<split>/<city>/<name>_gtFine_instanceIds.png`; the image id is `<name>`. The rules are those of
        cityscapesScripts (preparation/createPanopticImgs.py). A value of at least 1000 is an instance of the label
        value // 1000. A smaller value is a label, and marks a crowd region if the label is a thing. Labels that are
        not evaluated, such as "parking", are void.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        self.categories = get_categories("cityscapes")
        self._things = {category.id: i for i, category in enumerate(self.categories.things)}
        self._stuff = {category.id: i + 1 for i, category in enumerate(self.categories.stuff)}
        self._truth = Path(root) / "gtFine" / split
        folder = Path(root) / "leftImg8bit" / split
        check_folder(folder, "images")
        check_folder(self._truth, "annotations")
        self._images = sorted(folder.glob(f"*/*{_IMAGE_END}"))
        if not self._images:
            raise DataError(f"{folder}: no image is named <city>/<name>{_IMAGE_END}")

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def load(self, index: int) -> Sample:
        """Reads one image and its annotation.

        Raises:
            MissingFileError: If the annotation does not exist.
            DataError: If a file is damaged, sizes differ, or a label is unknown.
        """
        path = self._images[index]
        name = path.name.removesuffix(_IMAGE_END)
        truth_path = self._truth / path.parent.name / f"{name}{_TRUTH_END}"
        image, numbers = read_image(path), read_label_map(truth_path)
        check_same_size(image, path, numbers, truth_path)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < _LABELS * 1000:
            raise DataError(
                f"{truth_path}: expected values from 0 to {_LABELS * 1000 - 1}, got {numbers.min()}..{numbers.max()}"
            )
        counts = np.bincount(numbers.ravel())
        row_of = np.zeros(len(counts), np.int32)
        isthing, label, crowd, area = [], [], [], []
        for number in np.flatnonzero(counts).tolist():
            of = number if number < 1000 else number // 1000
            if of >= _LABELS:
                raise DataError(
                    f"{truth_path}: the value {number} has label {of}, which Cityscapes does not define"
                )
            if of not in self._things and of not in self._stuff:
                continue
            isthing.append(of in self._things)
            label.append(self._things.get(of, self._stuff.get(of, 0)))
            crowd.append(number < 1000 and isthing[-1])
            area.append(int(counts[number]))
            row_of[number] = len(area)
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(row_of[numbers]),
            isthing=torch.tensor(isthing, dtype=torch.bool, device="cpu"),
            label=torch.tensor(label, dtype=torch.int64, device="cpu"),
            crowd=torch.tensor(crowd, dtype=torch.bool, device="cpu"),
            area=torch.tensor(area, dtype=torch.int64, device="cpu"),
            image_id=name,
            file_name=str(path),
        )
