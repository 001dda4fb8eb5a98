"""Reads folders of id masks: for each image a gray picture whose values are instances or classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from panfpn_fast.data.categories import Categories, to_categories
from panfpn_fast.data.class_check import check_names
from panfpn_fast.data.files import DataError, check_folder, check_same_size, read_label_map
from panfpn_fast.data.images import IMAGE_SUFFIXES, is_image_path, read_image
from panfpn_fast.data.regions import Painter, Row, SegmentTable, make_sample
from panfpn_fast.data.rules import FoundClass, ReadingRules, make_categories
from panfpn_fast.data.sample import Sample

ONLY_CLASS = "object"
"""Name of the class of instance masks without `rules.classes`."""

_MOST_SIGNIFICANT = 2**31 - 1


class IdMasksDataset:
    """Images with a mask of ids each.

    Args:
        image_folder: Directory of the images; its subfolders are not searched.
        mask_folder: Directory of the masks: 8- or 16-bit gray, or 8-bit palette, without loss. The mask of `1.jpg` is
            `1.png`, or `1` with another suffix of an image.
        categories: The classes, or a name for `get_categories`; None makes them of `rules.classes`.
        rules: The meaning of the values; see Note.

    Raises:
        MissingFileError: If a directory does not exist.
        DataError: If there are no images, if `rules` lacks the classes, or if `rules.label_divisor` is 0 although there
            is not exactly one class of things.
        ClassMismatchError: If a name in `rules.classes` is not in `categories`.

    Note:
        0 is what nothing covers, and `rules.void_values` are void. With `rules.label_divisor` 0 each other value is one
        instance of the only class of things, `rules.classes[0]` ("object" without it). With 1 each value is a class.
        With a larger divisor D, such as 1000, a value of at least D is an instance of the class value // D, and a
        smaller one is a class. Class k has the name `rules.classes[k - 1]`; with `categories` and without
        `rules.classes`, class k is the one with the id k. A value that is a class is all stuff of the class, or a crowd
        region of things. These are the rules of Cityscapes with D = 1000.
    """

    def __init__(
        self,
        image_folder: str | os.PathLike[str],
        mask_folder: str | os.PathLike[str],
        categories: Categories | str | None = None,
        rules: ReadingRules | None = None,
    ) -> None:
        folder, self._folder = Path(image_folder), Path(mask_folder)
        self._rules = rules = rules or ReadingRules()
        check_folder(folder, "images")
        check_folder(self._folder, "masks")
        self._images = sorted(path for path in folder.iterdir() if is_image_path(path) and path.is_file())
        if not self._images:
            raise DataError(f"{folder}: no images in this folder (its subfolders are not searched)")
        self._masks = {
            path.stem: path
            for path in sorted(self._folder.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        }
        if categories is None:
            names = rules.classes or (() if rules.label_divisor else (ONLY_CLASS,))
            if not names:
                raise DataError(
                    "classes: expected the names of the classes in the masks, since label_divisor is "
                    f"{rules.label_divisor}; got nothing"
                )
            found = [FoundClass(i, name) for i, name in enumerate(names, 1)]
            self.categories = make_categories(self._folder, found, rules)
        else:
            self.categories = to_categories(categories)
            names = rules.classes
            check_names(self._folder, names, self.categories)
        # The id of each class k in the masks.
        if names:
            ids = {category.name: category.id for category in self.categories.all}
            self._class_ids = {k: ids[name] for k, name in enumerate(names, 1)}
        else:
            self._class_ids = {category.id: category.id for category in self.categories.all}
        self._things = [c.id for c in self.categories.things if c.id in self._class_ids.values()]
        if not rules.label_divisor and len(self._things) != 1:
            others = "" if categories is None else ", or give other categories"
            raise DataError(
                f"label_divisor: expected at least 1 with {len(self._things)} classes of things "
                f"({self.categories.name}), since 0 makes each value an instance of one class; got 0. Set it, list "
                f"only one class of things in classes{others}"
            )
        self._painter = Painter(self.categories, rules)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def load(self, index: int) -> Sample:
        """Reads one image and its mask.

        Raises:
            MissingFileError: If the mask does not exist.
            DataError: If a file is damaged, the sizes differ, or a value has no class.
        """
        path = self._images[index]
        mask_path = self._masks.get(path.stem, self._folder / f"{path.stem}.png")
        image, ids = read_image(path), read_label_map(mask_path, palette=True)
        check_same_size(image, path, ids, mask_path)
        values, place = np.unique(ids, return_inverse=True)
        if values.size and not 0 <= int(values[0]) <= int(values[-1]) <= _MOST_SIGNIFICANT:
            raise DataError(f"{mask_path}: expected values of at least 0, got {values[0]}..{values[-1]}")
        table = SegmentTable()
        rows = [self._row(value, mask_path) for value in values.tolist()]
        number = np.array([0 if row is None else table.number(row) for row in rows], np.int32)
        return make_sample(image, number[place.reshape(ids.shape)], table.rows, path.name, path)

    def _row(self, value: int, path: Path) -> Row | None:
        """Returns the segment of a value, or None for void."""
        divisor = self._rules.label_divisor
        if value in self._rules.void_values:
            return None
        if value == 0:
            return self._painter.background()
        if divisor == 0:
            return self._painter.row(self._things[0], False)
        instance = 1 < divisor <= value
        label = value // divisor if instance else value
        if label not in self._class_ids:
            raise DataError(
                f"{path}: the value {value} has the class {label}, which is not among the classes; list it in "
                "classes, or the value in void_values"
            )
        return self._painter.row(self._class_ids[label], not instance)
