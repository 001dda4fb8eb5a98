"""Opens datasets by the format of their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.coco_instances import CocoInstancesDataset
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.files import check_folder
from panfpn_fast.data.id_masks import IdMasksDataset
from panfpn_fast.data.labelme import LabelMeDataset
from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.rules import ReadingRules
from panfpn_fast.data.yolo import YoloDataset

FILE_KINDS = ("coco_panoptic", "coco_instances", "yolo", "labelme", "masks", "cityscapes")
"""The kinds of annotated images in files."""

_READERS: dict[str, Callable[[str, str, Categories | str | None, ReadingRules | None], PanopticDataset]] = {
    "coco_instances": CocoInstancesDataset,
    "yolo": YoloDataset,
    "labelme": LabelMeDataset,
    "masks": IdMasksDataset,
}


def open_dataset(
    kind: str,
    images: str,
    annotations: str,
    categories: Categories | str | None = None,
    rules: ReadingRules | None = None,
) -> PanopticDataset:
    """Opens a dataset of annotated images.

    Args:
        kind: One of `FILE_KINDS`.
        images: Directory of the images. For yolo, also "train", "val" or "test", the keys of data.yaml; for cityscapes,
            the directory that contains leftImg8bit and gtFine.
        annotations: The JSON for coco_panoptic and coco_instances, data.yaml for yolo, the directory of the JSON files
            for labelme and of the masks for masks, and the split for cityscapes.
        categories: A `Categories` object, or a name for `get_categories`. None takes the classes that the annotations
            list. Ignored for cityscapes.
        rules: How annotations that are not panoptic are read. Ignored for coco_panoptic and cityscapes.

    Raises:
        ValueError: If the kind is unknown.
        ImportError: If a package that reads the format is not installed.
        DataError: If a directory or file is missing or damaged, or the classes differ; see the class of the kind, such
            as `CocoInstancesDataset`.
    """
    if kind == "coco_panoptic":
        dataset = CocoPanopticDataset(images, annotations, categories=categories)
        # Missing evaluation images would end a training run after its last step.
        check_folder(dataset.image_folder, "images")
        check_folder(dataset.annotation_folder, "panoptic PNGs")
        return dataset
    if kind == "cityscapes":
        return CityscapesDataset(images, annotations)
    if kind in _READERS:
        if kind != "yolo":
            check_folder(Path(images), "images")
        return _READERS[kind](images, annotations, categories, rules)
    raise ValueError(f"kind: expected one of {', '.join(FILE_KINDS)}, got {kind!r}")
