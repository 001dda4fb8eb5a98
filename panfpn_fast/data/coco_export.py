"""Writes any data set in COCO's panoptic format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from panfpn_fast._files import atomic_write
from panfpn_fast.data.categories import Categories
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.data.own_png import OwnPngs
from panfpn_fast.data.sample import Sample, segment_boxes


class CocoExport:
    """Writes samples as COCO's panoptic format: a JSON, and PNGs in the folder of the same name.

    Use it as a context manager; the JSON is written when the block ends without an exception.

    Args:
        path: The JSON.
        categories: The classes.
        copy_images: Whether the images are written, too, to the folder `<stem>_images`, as PNGs. Otherwise the JSON
            names the files where they are.

    Attributes:
        image_folder: After the block, the folder that the names of the images are relative to.
        count: Number of images so far.
    """

    def __init__(self, path: Path, categories: Categories, copy_images: bool = False) -> None:
        self.path = path
        self.image_folder = path.with_name(f"{path.stem}_images")
        self.count = 0
        self._copy = copy_images
        self._categories = categories
        self._files: list[Path] = []
        self._pngs = OwnPngs("data convert")
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, sample: Sample) -> None:
        """Writes the PNG of an image, and keeps its segments for the JSON.

        Raises:
            OutputError: If there is a file of that name that is not a PNG of an earlier conversion.
        """
        height, width = sample.size
        name = self._pngs.name(sample.image_id)
        self._pngs.save(
            Image.fromarray(encode_panoptic(sample.segments.numpy())), self.path.with_suffix("") / name
        )
        file = Path(sample.file_name)
        if self._copy:
            file = self.image_folder / name
            pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
            self._pngs.save(Image.fromarray(pixels), file)
        self._files.append(file.absolute())
        self._images.append({"id": sample.image_id, "height": height, "width": width})
        self._annotations.append(
            {"image_id": sample.image_id, "file_name": name, "segments_info": self._segments(sample)}
        )
        self.count += 1

    def _segments(self, sample: Sample) -> list[dict[str, Any]]:
        boxes, areas = segment_boxes(sample.segments, len(sample.label))
        segments = []
        rows = zip(
            sample.classes(self._categories),
            sample.crowd.tolist(),
            boxes.tolist(),
            areas.tolist(),
            strict=True,
        )
        for number, (category, crowd, (x1, y1, x2, y2), area) in enumerate(rows, 1):
            if area > 0:
                segments.append(
                    {
                        "id": number,
                        "category_id": category.id,
                        "area": area,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "iscrowd": int(crowd),
                    }
                )
        return segments

    def __enter__(self) -> CocoExport:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Writes the JSON, unless an exception ended the block."""
        if kind is not None:
            return
        if self._files:
            self.image_folder = Path(os.path.commonpath([file.parent for file in self._files]))
        for image, file in zip(self._images, self._files, strict=True):
            image["file_name"] = file.relative_to(self.image_folder).as_posix()
        categories = [
            {"id": c.id, "name": c.name, "isthing": int(c.isthing), "color": list(c.color)}
            for c in self._categories.all
        ]
        content = {"images": self._images, "annotations": self._annotations, "categories": categories}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as target:
            target.write(json.dumps(content).encode())
