"""Segments in COCO's formats, and names of images as COCO's ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from panfpn_fast.data import Categories
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.inference.segment import Segment


class Entry(NamedTuple):
    """One image of a JSON in COCO's panoptic format.

    Attributes:
        name: Stem of the PNG's file name, unique in the JSON.
        source: File name of the image.
        height: Rows of the image.
        width: Columns of the image.
        segments_info: The segments, as in the JSON.
        frame: Number of the image among the frames of the file, from 1; None if there are no others.
    """

    name: str
    source: str
    height: int
    width: int
    segments_info: list[dict[str, Any]]
    frame: int | None = None


def make_entry(
    panoptic: Tensor, segments: Sequence[Segment], name: str, source: str, frame: int | None = None
) -> Entry:
    """Returns the JSON's part of one image; `panoptic` is int32 [H, W], the others are the fields of `Entry`."""
    segments_info = []
    for segment in segments:
        info = {
            "id": segment.id,
            "category_id": segment.category_id,
            "isthing": int(segment.isthing),
            "area": segment.area,
        }
        segments_info.append(info | score_field(segment))
    height, width = panoptic.shape
    return Entry(name, source, height, width, segments_info, frame)


def map_picture(panoptic: Tensor) -> Image.Image:
    """Returns a panoptic map, int32 [H, W], as a picture whose colors are the segment ids."""
    return Image.fromarray(encode_panoptic(panoptic.cpu().numpy()))


def panoptic_content(entries: Sequence[Entry], categories: Categories) -> dict[str, Any]:
    """Returns the content of a JSON in COCO's panoptic format."""
    images, annotations = [], []
    for image_id, entry in zip(image_ids(entry.name for entry in entries), entries, strict=True):
        image = {"id": image_id, "file_name": entry.source, "width": entry.width, "height": entry.height}
        images.append(image if entry.frame is None else image | {"frame": entry.frame})
        annotations.append(
            {"image_id": image_id, "file_name": f"{entry.name}.png", "segments_info": entry.segments_info}
        )
    return {"images": images, "annotations": annotations, "categories": category_rows(categories)}


def entries_of(content: Any) -> list[Entry]:
    """Returns the entries of a JSON in COCO's panoptic format, as `panoptic_content` makes it.

    Raises:
        LookupError, TypeError, AttributeError: If the content has another form.
    """
    images = {image["id"]: image for image in content["images"]}
    entries = []
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        name = annotation["file_name"].removesuffix(".png")
        entries.append(
            Entry(
                name,
                image["file_name"],
                image["height"],
                image["width"],
                annotation["segments_info"],
                image.get("frame"),
            )
        )
    return entries


def category_rows(categories: Categories) -> list[dict[str, Any]]:
    """Returns the field `categories` of a JSON."""
    return [
        {"id": c.id, "name": c.name, "isthing": int(c.isthing), "color": list(c.color)}
        for c in categories.all
    ]


def score_field(segment: Segment) -> dict[str, float]:
    """Returns the field `score` of a segment; stuff has none."""
    return {} if segment.score is None else {"score": round(segment.score, 6)}


def image_ids(names: Iterable[str]) -> list[int | str]:
    """Returns the ids of images by their names: a number becomes an integer, unless another name is the same number."""
    ids: dict[int | str, None] = {}
    for name in names:
        # "1" and "01" are the same number. The second one keeps its text as id, because ids must be unique.
        number = int(name) if name.isascii() and name.isdecimal() else name
        ids[name if number in ids else number] = None
    return list(ids)
