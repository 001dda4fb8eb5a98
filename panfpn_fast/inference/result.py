"""Results of a prediction: the panoptic map, its segments, and the outputs of both branches."""

from __future__ import annotations

import importlib
import io
import json
import operator
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageShow
from torch import Tensor

from panfpn_fast._errors import OutputError, UserError, one_line
from panfpn_fast._files import atomic_write, prepare_file
from panfpn_fast.data import Categories, Category
from panfpn_fast.data.images import PHOTO_COMPRESS_LEVEL, ImageArray
from panfpn_fast.data.own_png import OwnPngs
from panfpn_fast.inference.coco_format import (
    category_rows,
    image_ids,
    make_entry,
    map_picture,
    panoptic_content,
    score_field,
)
from panfpn_fast.inference.drawing import MAX_LABELS, ColorBy, draw_panoptic
from panfpn_fast.inference.segment import Segment, regions
from panfpn_fast.inference.sources import Source, read_source

__all__ = ["Instances", "PanopticResult"]


# A notebook gets pictures of at most this many pixels along the longer edge.
_PREVIEW_EDGE = 1280
_SAVE_OPTIONS: dict[str, dict[str, int]] = {
    "PNG": {"compress_level": PHOTO_COMPRESS_LEVEL},
    "JPEG": {"quality": 92},
}


@dataclass(frozen=True, eq=False)
class Instances:
    """Instances that the instance branch detects, before merging, by descending score; N may be 0.

    Attributes:
        boxes: float32 [N, 4], x1, y1, x2, y2 in pixels of the original image.
        scores: float32 [N], 0..1.
        classes: int64 [N], index among the things.
        mask_probs: float32 [N, 28, 28], mask probabilities within the box, 0..1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    mask_probs: Tensor

    def __len__(self) -> int:
        """Number of instances."""
        return self.boxes.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class PanopticResult:
    """The prediction for one image; all tensors are on the CPU.

    Attributes:
        panoptic: int32 [H, W] in the size of the original image: segment ids, 0 = void.
        segments: One `Segment` per id in `panoptic`: things by descending score, then stuff by class.
        instances: All instances of the instance branch, including those that merging dropped. With
            `Predictor(instances="panoptic")`, those with enough score for the map; merging may still have dropped some
            that others cover.
        semantic: uint8 [H, W] label map of the semantic branch (int16 above 255 stuff classes): 0 = 'other' (things),
            i + 1 = stuff class i.
        categories: The classes of the network. Printing and drawing need nothing else, so they work in any process.
        image: uint8 RGB [H, W, 3], the upright image that was predicted; None if a result is made without it. An array
            that was passed in a call of the predictor is not copied; `stream` copies it.
        source: Path, address or camera of the image; None if it has none.
        frame: Number of the image among the frames of a video or an image file, from 1; None if there are no others.
        time: Seconds after the first frame of the video; None for other images.

    Note:
        A result keeps the image, the maps and the instances, and nothing per segment: masks are computed when they are
        asked for. To keep many results, store `result.segments[i].rle()` or `result.to_coco()` instead.

    Example:
        >>> from panfpn_fast import PanopticFPN, Predictor
        >>> result = Predictor(PanopticFPN(), device="cpu", short_edge=64)(np.zeros((48, 64, 3), np.uint8))
        >>> result.image.shape, result.draw().size, sorted(result.to_coco())
        ((48, 64, 3), (64, 48), ['annotations', 'categories', 'images'])
    """

    panoptic: Tensor
    segments: list[Segment]
    instances: Instances
    semantic: Tensor
    categories: Categories
    image: ImageArray | None = None
    source: str | None = None
    frame: int | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        bound = [segment._bound_to(self.panoptic) for segment in self.segments]
        object.__setattr__(self, "segments", bound)

    def category(self, segment: Segment) -> Category:
        """Returns the class of a segment, with the data set's color."""
        return (self.categories.things if segment.isthing else self.categories.stuff)[segment.class_index]

    def summary(self) -> str:
        """Returns one line that lists the segments: "3 person, 1 dog, sky, grass"; stuff by descending area."""
        things = Counter(self.category(s).display_name for s in self.segments if s.isthing)
        stuff = sorted((s for s in self.segments if not s.isthing), key=lambda s: -s.area)
        parts = [f"{count} {name}" for name, count in things.most_common()]
        parts += dict.fromkeys(self.category(s).display_name for s in stuff)
        return ", ".join(parts) or "nothing"

    def draw(
        self,
        image: Source | None = None,
        *,
        opacity: float = 0.5,
        labels: bool = True,
        color_by: ColorBy = "class",
        boxes: bool = False,
        scores: bool = False,
        max_labels: int | None = MAX_LABELS,
    ) -> Image.Image:
        """Draws the segments over their image: colors, outlines and class names.

        Args:
            image: The image to draw on instead of the image that was predicted: uint8 RGB array [H, W, 3], uint8 RGB
                tensor [3, H, W], PIL image, path or address.
            opacity: Opacity of the colors over the image, 0..1.
            labels: Whether to write class names.
            color_by: "class" for the colors of the classes, in shades for the instances of one class, or "instance"
                for a color of its own for each thing; stuff keeps the colors of the classes.
            boxes: Whether to draw the boxes of things, `Segment.bbox`.
            scores: Whether to write the scores of things after their names.
            max_labels: Largest number of names; None for no limit. If there are more segments, the largest ones are
                named, and a legend in a corner lists the classes; it is left out where it does not fit.

        Returns:
            An RGB image of the same size.

        Raises:
            TypeError: If `max_labels` is not an integer or None.
            ValueError: If the sizes of image and panoptic map differ, `opacity` is outside 0..1, `color_by` is another
                word, `max_labels` is negative, or there is no image.

        Note:
            Deterministic. Void pixels show the image.
        """
        return draw_panoptic(
            self._photograph(image),
            self.panoptic.cpu().numpy(),
            [(segment.id, self.category(segment)) for segment in self.segments],
            opacity=opacity,
            labels=labels,
            color_by=color_by,
            boxes=boxes,
            scores=[segment.score for segment in self.segments] if scores else None,
            max_labels=max_labels,
        )

    def show(self, **options: Any) -> None:
        """Shows the drawing: in the notebook, or else in the system's image viewer.

        Args:
            **options: Arguments of `draw`.

        Raises:
            RuntimeError: If there is neither a notebook nor an image viewer.
        """
        picture = self.draw(**options)
        ipython: Any = sys.modules.get("IPython")  # a notebook has imported it
        if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
            importlib.import_module("IPython.display").display(picture)
        elif not ImageShow.show(picture):
            raise RuntimeError('show: found no image viewer; write a file with result.save("drawn.png")')

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes the drawing as a picture, or the segments in COCO's panoptic format.

        Args:
            path: File to write; its folder is made if missing. The suffix selects the format: `.json` writes the
                segments, and the map to the folder beside it that has the JSON's name without the suffix. Any suffix
                that Pillow can write, such as `.png` or `.jpg`, writes the drawing.
            **options: Arguments of `draw`, for pictures.

        Raises:
            TypeError: If options are given for a JSON.
            ValueError: If Pillow cannot write the drawing in the format of the suffix, or `draw` raises it.
            OSError: If the file cannot be written, or the PNG of the map would replace a file that `save` did not
                write, such as the image itself; the message names it.
        """
        target = Path(path)
        try:
            if target.suffix.lower() == ".json":
                self._save_segments(target, options)
            else:
                self._save_picture(target, options)
        except UserError:  # about an output, or about the image to draw on
            raise
        except OSError as error:  # such as a name that is too long
            raise OutputError(
                f"path: {target} cannot be written ({one_line(error)}); give another name or folder"
            ) from error

    def _save_segments(self, target: Path, options: dict[str, Any]) -> None:
        if options:
            raise TypeError(f"path: {target} is not a picture, so it takes no option {', '.join(options)}")
        prepare_file(target, "path")
        folder = target.with_suffix("")
        if folder.exists() and not folder.is_dir():
            raise OutputError(
                f"path: {target} needs the folder {folder} for its map, but that is a file; give another name"
            )
        folder.mkdir(exist_ok=True)
        # The name of the PNG is that of the image, and the folder may be the image's own.
        pngs = OwnPngs("save", f"that `save` did not make; give another name than {target}")
        entry = make_entry(self.panoptic, self.segments, self._name(), self._file_name(), self.frame)
        pngs.save(map_picture(self.panoptic), folder / f"{entry.name}.png")
        with atomic_write(target) as file:
            file.write(json.dumps(panoptic_content([entry], self.categories)).encode())

    def _save_picture(self, target: Path, options: dict[str, Any]) -> None:
        formats = {k: v for k, v in Image.registered_extensions().items() if v in Image.SAVE}
        kind = formats.get(target.suffix.lower())
        if kind is None:
            raise ValueError(
                f"path: expected a name that ends in .json or in the suffix of a picture such as .png or .jpg, "
                f"got {target.name!r}"
            )
        drawing = self.draw(**options)
        prepare_file(target, "path")
        with io.BytesIO() as encoded:
            try:
                drawing.save(encoded, format=kind, **_SAVE_OPTIONS.get(kind, {}))
            except (OSError, ValueError) as error:  # a format without RGB, or with a limit of size
                raise ValueError(
                    f"path: Pillow cannot write {target} in the format {kind} ({error}); "
                    f"give {target.with_suffix('.png').name}"
                ) from error
            with atomic_write(target) as file:
                file.write(encoded.getbuffer())

    def to_coco(self, image_id: int | str | None = None, first_id: int = 1) -> dict[str, Any]:
        """Returns the segments as a data set in COCO's instances format, which json.dumps and pycocotools take.

        Args:
            image_id: Id of the image; None for the number in its file name ("000000142238.jpg" is 142238), or 1.
            first_id: Id of the first annotation. Ids are unique in a data set, so a second image starts after the
                first one's.

        Returns:
            A dictionary with "images" (one), "annotations" (one per segment) and "categories". An annotation has "id",
            "image_id", "category_id", "segmentation" (compressed run lengths), "bbox" (x, y, width, height), "area",
            "iscrowd", and for things "score". `save("result.json")` writes the panoptic format instead.
        """
        if image_id is None:
            [found] = image_ids([self._name()])
            image_id = found if isinstance(found, int) else 1
        elif not isinstance(image_id, str):
            image_id = operator.index(image_id)  # json.dumps takes no integers of NumPy
        height, width = self.panoptic.shape
        annotations = []
        for number, region in enumerate(regions(self.panoptic, self.segments), operator.index(first_id)):
            segment, rle = region.segment, region.rle()
            annotation = {
                "id": number,
                "image_id": image_id,
                "category_id": segment.category_id,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "bbox": list(region.box),
                "area": segment.area,
                "iscrowd": 0,
            }
            annotations.append(annotation | score_field(segment))
        image = {"id": image_id, "file_name": self._file_name(), "width": width, "height": height}
        return {"images": [image], "annotations": annotations, "categories": category_rows(self.categories)}

    def to_dataframe(self) -> Any:
        """Returns a table of the segments as a pandas.DataFrame.

        Returns:
            One row per segment with the columns id, category_id, name, isthing, class_index, score (NaN for stuff),
            area, instance (Int64, <NA> for stuff), and the box as x, y, width and height.

        Raises:
            ImportError: If pandas is not installed; the message has the command.
        """
        pandas = _optional("pandas", "to_dataframe")
        found = regions(self.panoptic, self.segments)
        boxes = np.array([region.box for region in found], np.int64).reshape(-1, 4)
        of = self.segments
        return pandas.DataFrame(
            {
                "id": np.array([s.id for s in of], np.int64),
                "category_id": np.array([s.category_id for s in of], np.int64),
                "name": [s.name for s in of],
                "isthing": np.array([s.isthing for s in of], bool),
                "class_index": np.array([s.class_index for s in of], np.int64),
                "score": np.array([s.score for s in of], np.float64),  # None becomes NaN
                "area": np.array([s.area for s in of], np.int64),
                "instance": pandas.array([s.instance for s in of], dtype="Int64"),
                **dict(zip(("x", "y", "width", "height"), boxes.T, strict=True)),
            }
        )

    def to_supervision(self) -> Any:
        """Returns the segments as supervision.Detections.

        Returns:
            One detection per segment, with `xyxy` float32 [N, 4], `mask` bool [N, H, W], `confidence` float32 [N] (NaN
            for stuff), `class_id` int64 [N] (the data set's ids), and in `data` "class_name" [N], "isthing" [N] and
            "segment_id" [N]. `detections[detections["isthing"]]` selects the things.

        Raises:
            ImportError: If supervision is not installed; the message has the command.

        Note:
            The masks are dense, as supervision needs them: N x H x W bytes.
        """
        supervision = _optional("supervision", "to_supervision")
        of = self.segments
        height, width = self.panoptic.shape
        masks = np.zeros((len(of), height, width), bool)
        boxes = np.zeros((len(of), 4), np.float32)
        for number, region in enumerate(regions(self.panoptic, of)):
            x, y, w, h = region.box
            masks[number, y : y + h, x : x + w] = region.crop
            boxes[number] = x, y, x + w, y + h
        return supervision.Detections(
            xyxy=boxes,
            mask=masks,
            confidence=np.array([s.score for s in of], np.float32),
            class_id=np.array([s.category_id for s in of], np.int64),
            data={
                "class_name": np.array([s.name for s in of], str),
                "isthing": np.array([s.isthing for s in of], bool),
                "segment_id": np.array([s.id for s in of], np.int64),
            },
        )

    def _repr_png_(self) -> bytes | None:
        """Returns the drawing for notebooks as a PNG, reduced if it is large; None without an image."""
        if self.image is None:
            return None
        step = -(-max(self.panoptic.shape) // _PREVIEW_EDGE)
        small = replace(
            self,
            panoptic=self.panoptic[::step, ::step],
            image=np.asarray(Image.fromarray(self.image).reduce(step)),
        )
        with io.BytesIO() as file:
            small.draw().save(file, format="PNG", **_SAVE_OPTIONS["PNG"])
            return file.getvalue()

    def _photograph(self, image: Source | None) -> ImageArray:
        if image is not None:
            return read_source(image).image
        if self.image is None:
            raise ValueError("image: expected an image, because the result was made without one; got None")
        return self.image

    def _file_name(self) -> str:
        """Returns the file name of the image; "image" without a source."""
        source = self.source or ""
        path = urlsplit(source).path if "://" in source else source
        return Path(path).name or "image"

    def _name(self) -> str:
        stem = Path(self._file_name()).stem
        while len(os.fsencode(stem)) > 250:  # with a suffix, more are too many for file systems
            stem = stem[:-1]
        return stem

    def __repr__(self) -> str:
        """Returns the size and the summary, without the tensors."""
        height, width = self.panoptic.shape
        return f"PanopticResult({height} x {width}: {self.summary()})"


def _optional(package: str, method: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{method} needs {package} ({error}): pip install {package}") from error
