"""Segments in COCO's formats, and names of images as COCO's ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from panfpn_fast.data import Categories
from panfpn_fast.data.coco_ids import encode_panoptic
from panfpn_fast.data.images import save_png
from panfpn_fast.inference.segment import Segment


class Entry(NamedTuple):
    """One image of a JSON in COCO's panoptic format; `name` is unique in the JSON."""

    name: str
    source: str
    height: int
    width: int
    segments_info: list[dict[str, Any]]


def write_map(
    panoptic: Tensor,
    segments: Sequence[Segment],
    folder: Path,
    name: str,
    source: str,
    save: Callable[[Image.Image, Path], None] = save_png,
) -> Entry:
    """Writes the PNG of a panoptic map.

    Args:
        panoptic: int32 [H, W].
        segments: The segments of the map.
        folder: Folder of the PNGs.
        name: Stem of the PNG's file name.
        source: File name of the image.
        save: Writes the PNG.

    Returns:
        The image's part of the JSON.
    """
    ids = panoptic.cpu().numpy()
    save(Image.fromarray(encode_panoptic(ids)), folder / f"{name}.png")
    height, width = ids.shape
    return Entry(name, source, height, width, info_of(segments))


def info_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Returns the field `segments_info` of an image."""
    return [
        {
            "id": segment.id,
            "category_id": segment.category_id,
            "isthing": int(segment.isthing),
            "area": segment.area,
            **score_field(segment),
        }
        for segment in segments
    ]


def panoptic_content(entries: Sequence[Entry], categories: Categories) -> dict[str, Any]:
    """Returns the content of a JSON in COCO's panoptic format."""
    images, annotations = [], []
    for image_id, entry in zip(image_ids(entry.name for entry in entries), entries, strict=True):
        size = {"width": entry.width, "height": entry.height}
        images.append({"id": image_id, "file_name": entry.source, **size})
        annotations.append(
            {"image_id": image_id, "file_name": f"{entry.name}.png", "segments_info": entry.segments_info}
        )
    return {"images": images, "annotations": annotations, "categories": category_rows(categories)}


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
