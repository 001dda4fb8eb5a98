"""Data sets and loaders for the benchmarks of data loading: ours, and what a user of torchvision would write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.coco_panoptic import CocoPanopticDataset
from panfpn_fast.data.loader import PanopticDataset, TrainLoader
from panfpn_fast.data.sample import Sample
from panfpn_fast.data.synthetic import SyntheticDataset
from panfpn_fast.data.transforms import Compose, Flip, KeepBoxes, Resize

_ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(os.environ.get("PANFPN_SHARED", _ROOT.parent / "shared")) / "coco_sample"
"""Two photographs of COCO with their annotations, 640 x 427 and 640 x 360, which are not part of the repository."""

MAX_EDGE = 1333


class Loaded(NamedTuple):
    """An image uint8 [3, H, W], boxes [N, 4] and classes [N] of its instances, and maps [H, W] or masks [N, H, W]."""

    image: Tensor
    boxes: Tensor
    classes: Tensor
    instances: Tensor
    semantic: Tensor


class Repeated:
    """A data set whose images are repeated until there are as many as wanted."""

    def __init__(self, dataset: PanopticDataset, count: int) -> None:
        self.dataset = dataset
        self.count = count
        self.categories: Categories = dataset.categories

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Sample:
        return self.dataset.load(index % len(self.dataset))


def sample_problem(device: torch.device) -> str | None:
    """Returns why the photographs cannot be read, or None if they can."""
    return None if SAMPLE.is_dir() else f"there is no coco_sample in {SAMPLE.parent}; see PANFPN_SHARED"


def open_photographs() -> CocoPanopticDataset:
    return CocoPanopticDataset(SAMPLE / "images", SAMPLE / "panoptic.json", categories="coco_panoptic")


def open_scenes(count: int) -> SyntheticDataset:
    return SyntheticDataset(count)


def train_loader(dataset: PanopticDataset, short_edge: int, batch_size: int, workers: int) -> TrainLoader:
    """Returns the loader of a training run that resizes and flips."""
    transform = Compose([KeepBoxes(), Resize([short_edge], MAX_EDGE), Flip()])
    return TrainLoader(dataset, transform, batch_size, workers=workers)


def load_ours(
    dataset: PanopticDataset, count: int, short_edge: int, batch_size: int, workers: int
) -> list[Loaded]:
    """Starts a loader, loads `count` images, and ends the workers."""
    loader = train_loader(Repeated(dataset, count), short_edge, batch_size, workers)
    found = []
    try:
        batches = iter(loader)
        for _ in range(count // batch_size):
            batch = next(batches)
            found += [
                Loaded(image, *target) for image, target in zip(batch.images, batch.targets, strict=True)
            ]
    finally:
        loader.close()
    return found


class Annotated(NamedTuple):
    """An image before the transforms: [3, H, W], ids int32 [H, W], and (id, isthing, label, iscrowd) of segments."""

    image: Tensor
    ids: Tensor
    segments: list[tuple[int, bool, int, bool]]


def read_photograph(index: int) -> Annotated:
    """Reads a photograph and its annotation with Pillow and NumPy."""
    content, categories = _annotations()
    annotation = content["annotations"][index % len(content["annotations"])]
    names = {image["id"]: image["file_name"] for image in content["images"]}
    image = Image.open(SAMPLE / "images" / names[annotation["image_id"]]).convert("RGB")
    colors = np.asarray(Image.open(SAMPLE / "panoptic" / annotation["file_name"])).astype(np.int32)
    ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
    segments = [
        (one["id"], *categories[one["category_id"]], bool(one["iscrowd"]))
        for one in annotation["segments_info"]
    ]
    return Annotated(torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(ids), segments)


_read: dict[Path, tuple[Any, dict[int, tuple[bool, int]]]] = {}


def _annotations() -> tuple[Any, dict[int, tuple[bool, int]]]:
    """Returns the JSON, and whether each category is a thing and its label; read once, as in an `__init__`."""
    if SAMPLE not in _read:
        categories = json.loads((SAMPLE / "panoptic_coco_categories.json").read_text())
        labels: dict[int, tuple[bool, int]] = {}
        for isthing, first in ((True, 0), (False, 1)):
            of_kind = [one["id"] for one in categories if bool(one["isthing"]) == isthing]
            labels |= {id_: (isthing, number) for number, id_ in enumerate(of_kind, first)}
        _read[SAMPLE] = json.loads((SAMPLE / "panoptic.json").read_text()), labels
    return _read[SAMPLE]


def read_scene(scenes: SyntheticDataset, index: int) -> Annotated:
    sample = scenes.load(index)
    columns = (sample.isthing.tolist(), sample.label.tolist(), sample.crowd.tolist())
    segments = [(number, *row) for number, row in enumerate(zip(*columns, strict=True), 1)]
    return Annotated(sample.image, sample.segments, segments)


class TorchvisionDataset(Dataset[Loaded]):
    """Images with masks, boxes and a semantic map, flipped and resized by torchvision's transforms.

    It follows torchvision's tutorial on object detection: a mask for each instance, `masks_to_boxes`, `tv_tensors`, and
    uint8 tensors, which its documentation recommends for speed.
    """

    def __init__(self, read: Callable[[int], Annotated], count: int, short_edge: int) -> None:
        from torchvision.transforms import v2

        self.read = read
        self.count = count
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(0.5), v2.Resize(short_edge, max_size=MAX_EDGE, antialias=True)]
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Loaded:
        from torchvision import tv_tensors
        from torchvision.ops import masks_to_boxes

        image, ids, segments = self.read(index)
        semantic = torch.full(ids.shape, 255, dtype=torch.uint8)
        for id_, isthing, label, _ in segments:
            semantic[ids == id_] = 0 if isthing else label
        things = [
            (id_, label)
            for id_, isthing, label, crowd in segments
            if isthing and not crowd and bool((ids == id_).any())
        ]
        instances = torch.tensor([id_ for id_, _ in things], dtype=torch.int32)
        masks = (ids == instances[:, None, None]).to(torch.uint8)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # behind the last column and row, as ours
        image, boxes, masks, semantic = self.transform(
            tv_tensors.Image(image),
            tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=ids.shape),
            tv_tensors.Mask(masks),
            tv_tensors.Mask(semantic),
        )
        return Loaded(image, boxes, torch.tensor([label for _, label in things]), masks, semantic)


def load_torchvision(
    read: Callable[[int], Annotated], count: int, short_edge: int, batch_size: int, workers: int
) -> list[Loaded]:
    """Loads `count` images with torch's DataLoader, and ends the workers."""
    dataset = TorchvisionDataset(read, count, short_edge)
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, collate_fn=list)
    return [image for batch in loader for image in batch]
