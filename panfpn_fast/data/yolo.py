"""Reads the YOLO segmentation format: a data.yaml, images, and a text file of polygons for each image."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.fields import Fields, is_integer, short
from panfpn_fast.data.files import DataError, MissingFileError, read_text
from panfpn_fast.data.images import is_image_path, read_image
from panfpn_fast.data.polygons import polygon_problem, polygons_rle, pycocotools_mask
from panfpn_fast.data.regions import Painter, Region
from panfpn_fast.data.rules import FoundClass, ReadingRules, choose_categories
from panfpn_fast.data.sample import Sample

SPLITS = ("train", "val", "test")
"""The keys of data.yaml that name images."""

_MOST_CLASSES = 100_000
_CLASS = re.compile("[0-9]{1,6}")


class DataYaml:
    """A data.yaml.

    Args:
        path: The file.

    Raises:
        MissingFileError: If the file does not exist.
        DataError: If it is not YAML, or a key has a wrong value.
        ImportError: If PyYAML is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields = Fields(path, "", _read_yaml(path))
        self.names = self._read_names()
        if "nc" in self._fields.entry and self._fields.integer("nc", 0, _MOST_CLASSES) != len(self.names):
            raise self._fields.error("nc", f"{len(self.names)}, as many as 'names' has")

    def _read_names(self) -> dict[int, str]:
        names = self._fields.value("names")
        rows = dict(enumerate(names)) if isinstance(names, list) else names
        if not isinstance(rows, dict) or not rows:
            raise self._fields.error("names", "names of classes, in a list or by number")
        for number, name in rows.items():
            if not is_integer(number, 0, _MOST_CLASSES) or not isinstance(name, str) or not name:
                raise self._fields.error("names", "names of classes, in a list or by number")
        return rows

    def has(self, split: str) -> bool:
        """Whether the file names the images of a split."""
        return self._fields.entry.get(split) is not None

    def images(self, split_or_path: str) -> list[Path]:
        """Returns the images of a split, or of a folder or a list of images that is not in the file.

        Raises:
            MissingFileError: If a folder or list does not exist.
            DataError: If the entry has another type, or there are no images.
        """
        if split_or_path in SPLITS and (self.has(split_or_path) or not _exists(Path(split_or_path))):
            value = self._fields.value(split_or_path)
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, str) and part for part in parts):
                raise self._fields.error(split_or_path, "a path or a list of paths")
            sources = [self._resolve(part) for part in parts]
        else:
            sources = [Path(split_or_path)]
        found = sorted({image for source in sources for image in _images_in(source, self.path)})
        if not found:
            raise DataError(f"{self.path}: no images in {', '.join(map(str, sources)) or split_or_path}")
        return found

    def _resolve(self, part: str) -> Path:
        """Returns the path of an entry, which is relative to the key `path`, itself relative to the file's folder."""
        root = self.path.parent
        if self._fields.entry.get("path") is not None:
            root = root / self._fields.text("path")
        # Roboflow writes ../train/images for train/images.
        if not _exists(root / part) and part.startswith("../") and _exists(root / part[3:]):
            return root / part[3:]
        return root / part


class YoloDataset:
    """Images with polygons in the format of Ultralytics' YOLO segmentation.

    Args:
        images: "train", "val" or "test", the keys of data.yaml; or a folder of images, or a text file that lists them.
        data_yaml: The data.yaml, with `names`, and `train` and `val` as paths, relative to `path` or to the file.
        categories: The classes, or a name for `get_categories`; None selects `names`, whose numbers are the ids.
        rules: Decides, for the classes of data.yaml, which are stuff, and the class of uncovered pixels.

    Raises:
        MissingFileError: If the file or a folder does not exist.
        DataError: If data.yaml is damaged or a key has a wrong value, or there are no images, or none has labels.
        ClassMismatchError: If data.yaml has a class that is not in `categories`.
        ImportError: If PyYAML or pycocotools is not installed.

    Note:
        The labels of `.../images/a/1.jpg` are `.../labels/a/1.txt`; without a folder `images` they are beside the
        image. An image without that file has no annotations. Each line is a class and a polygon, x1 y1 x2 y2 ... as
        shares of width and height. A line with a box alone is an error. Folders are searched with their subfolders.
    """

    def __init__(
        self,
        images: str,
        data_yaml: str | os.PathLike[str],
        categories: Categories | str | None = None,
        rules: ReadingRules | None = None,
    ) -> None:
        path, rules = Path(data_yaml), rules or ReadingRules()
        pycocotools_mask(path)
        data = DataYaml(path)
        self._images = data.images(images)
        if not any(_exists(_labels_of(image)) for image in self._images):
            raise DataError(
                f"{path}: {images}: found no file of labels; expected one such as {_labels_of(self._images[0])}"
            )
        common = Path(os.path.commonpath([image.parent.absolute() for image in self._images]))
        self._ids = [image.absolute().relative_to(common).as_posix() for image in self._images]
        found = [FoundClass(id_, name) for id_, name in data.names.items()]
        self.categories = choose_categories(path, found, categories, rules)
        self._class_numbers = data.names.keys()
        self._painter = Painter(self.categories, rules)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def load(self, index: int) -> Sample:
        """Reads one image and its labels.

        Raises:
            MissingFileError: If the image does not exist.
            DataError: If the image is damaged, or a line of the labels is wrong; the message names file and line.
        """
        path = self._images[index]
        image = read_image(path)
        regions = list(self._regions(_labels_of(path), *image.shape[:2]))
        return self._painter.paint(image, regions, self._ids[index], path)

    def _regions(self, path: Path, height: int, width: int) -> Iterator[Region]:
        for number, line in enumerate(_lines(path), 1):
            words = line.split()
            if not words:
                continue
            where = f"{path}: line {number}"
            if not _CLASS.fullmatch(words[0]) or int(words[0]) not in self._class_numbers:
                raise DataError(f"{where}: class: expected a class of data.yaml, got {short(words[0])}")
            if len(words) == 5:
                raise DataError(
                    f"{where}: expected a class and a polygon, got a box; segmentation needs polygons"
                )
            try:
                shares = [float(word) for word in words[1:]]
            except ValueError:
                raise DataError(f"{where}: expected numbers after the class, got {short(line)}") from None
            polygon = [share * (height if i % 2 else width) for i, share in enumerate(shares)]
            if problem := polygon_problem(polygon, height, width):
                raise DataError(f"{where}: expected {problem}, got {short(line)}")
            yield Region(int(words[0]), polygons_rle([polygon], height, width))


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path}: {error}. It needs PyYAML: pip install pyyaml") from error
    return read_text(path, "YAML", yaml.safe_load)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a null byte, or a name that is too long
        return False


def _images_in(source: Path, path: Path) -> Iterator[Path]:
    """Yields the images of a folder and its subfolders, or of a text file that lists them."""
    if not _exists(source):
        raise MissingFileError(f"{source}: no such folder or file; {path} names it")
    if source.is_dir():
        yield from (image for image in source.rglob("*") if is_image_path(image) and image.is_file())
    else:
        for line in _lines(source):
            if line.strip():
                image = source.parent / line.strip()
                if not is_image_path(image):
                    raise DataError(f"{source}: expected names of images, got {short(line)}")
                yield image


def _labels_of(image: Path) -> Path:
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path, "text", str.splitlines)
    except MissingFileError:  # an image without objects needs no labels
        return []
