"""Opens a data set by the kind of its files."""

from __future__ import annotations

from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.loader import PanopticDataset

FILE_KINDS = ("coco_panoptic", "cityscapes")


def open_dataset(kind: str, images: str, annotations: str, categories: str | None = None) -> PanopticDataset:
    """Opens annotated images.

    Args:
        kind: "coco_panoptic" or "cityscapes".
        images: coco_panoptic: the folder of the images; cityscapes: the one that holds leftImg8bit and gtFine.
        annotations: coco_panoptic: the JSON; cityscapes: the split.
        categories: coco_panoptic: name of a known data set, or None: the classes that the JSON lists.

    Raises:
        ValueError: The kind is unknown.
        DataError: A folder or file is missing or damaged; see the data set's class.
    """
    if kind == "coco_panoptic":
        return CocoPanopticDataset(images, annotations, categories=categories)
    if kind == "cityscapes":
        return CityscapesDataset(images, annotations)
    raise ValueError(f"kind: expected one of {', '.join(FILE_KINDS)}, got {kind!r}")
