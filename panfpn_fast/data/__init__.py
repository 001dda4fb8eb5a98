"""Data: categories, annotated data sets, images, augmentation and the training loader."""

from __future__ import annotations

from panfpn_fast.data.categories import Categories, Category, get_categories
from panfpn_fast.data.cityscapes import CityscapesDataset
from panfpn_fast.data.coco_instances import CocoInstancesDataset
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.datasets import open_dataset
from panfpn_fast.data.files import DataError
from panfpn_fast.data.id_masks import IdMasksDataset
from panfpn_fast.data.images import read_image
from panfpn_fast.data.labelme import LabelMeDataset
from panfpn_fast.data.loader import PanopticDataset, TrainLoader
from panfpn_fast.data.panoptic_json import read_categories
from panfpn_fast.data.rules import ReadingRules
from panfpn_fast.data.sample import Sample, Target
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.yolo import YoloDataset

__all__ = [
    "Categories",
    "Category",
    "CityscapesDataset",
    "CocoInstancesDataset",
    "CocoPanopticDataset",
    "DataError",
    "IdMasksDataset",
    "LabelMeDataset",
    "PanopticDataset",
    "ReadingRules",
    "Sample",
    "SyntheticDataset",
    "Target",
    "TrainLoader",
    "YoloDataset",
    "get_categories",
    "open_dataset",
    "read_categories",
    "read_image",
]
