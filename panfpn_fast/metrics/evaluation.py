"""Evaluates a network on an annotated data set: panoptic quality, IoU of label maps, box AP and mask AP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from panfpn_fast.data.categories import Categories, get_categories
from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import (
    PanopticDataset,
    Unreadable,
    check_workers,
    close_workers,
    prepare_worker,
    start_workers,
)
from panfpn_fast.data.sample import IGNORE, Sample, runs_of, semantic_map
from panfpn_fast.data.transfer import pack_in_worker
from panfpn_fast.distributed import broadcast, gather, rank_and_world_size
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.metrics import PanopticQuality, SemanticQuality, match_segments
from panfpn_fast.metrics.coco_ap import InstanceAP
from panfpn_fast.metrics.semantic import CITYSCAPES_INSTANCE_SIZES
from panfpn_fast.metrics.tables import KINDS, QUALITIES, SUFFIX

__all__ = ["Evaluation", "evaluate"]


class Evaluation:
    """Accumulates the metrics over images. It can be pickled, so that processes can share the work.

    Args:
        categories: Categories of the data set and of the network.
        with_ap: Whether to compute AP, which needs pycocotools.
        tasks: Branches of the network. AP is computed for "instance" if there are things, IoU for "semantic" if there
            is stuff.
    """

    def __init__(
        self,
        categories: Categories,
        with_ap: bool = True,
        tasks: Sequence[str] = ("instance", "semantic"),
    ) -> None:
        self.categories = categories
        self.panoptic = PanopticQuality({category.id: category.isthing for category in categories.all})
        stuff = len(categories.stuff)
        self.semantic = SemanticQuality(stuff + 1, IGNORE) if "semantic" in tasks and stuff else None
        with_ap = with_ap and "instance" in tasks and len(categories.things) > 0
        self.instances = InstanceAP(categories) if with_ap else None
        sizes = CITYSCAPES_INSTANCE_SIZES if categories == get_categories("cityscapes") else {}
        # Its labels are positions in `categories.all`.
        self.parsing = (
            SemanticQuality(
                len(categories.all), IGNORE, {i: sizes[c.name] for i, c in enumerate(categories.things)}
            )
            if sizes
            else None
        )
        self.images = 0
        self.skipped: list[str] = []

    def add(self, number: int, sample: Sample, result: PanopticResult) -> None:
        """Compares a prediction with its annotation.

        Args:
            number: Position of the image in the data set.
            sample: The annotated image.
            result: The prediction for the image.
        """
        found = match_segments(
            np.ascontiguousarray(sample.segments.numpy()),
            self._table(sample),
            np.ascontiguousarray(result.panoptic.numpy()),
            [{"id": segment.id, "category_id": segment.category_id} for segment in result.segments],
            self.panoptic.categories,
            sample.image_id,
        )
        self.panoptic.add(found)
        if self.semantic is not None:
            self.semantic.add(semantic_map(sample), result.semantic)
        if self.instances is not None:
            self.instances.add(number, sample, result.instances)
        if self.parsing is not None:
            self.parsing.add(*self._label_maps(sample, result))
        self.images += 1

    def _table(self, sample: Sample) -> list[dict[str, Any]]:
        table = []
        columns = (sample.isthing, sample.label, sample.crowd, sample.area)
        # Segments without area are left out, unless the map has pixels of them: then the area is an error.
        present = set() if (sample.area > 0).all() else set(sample.segments.unique().tolist())
        for row, (isthing, label, crowd, area) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            category = self.categories.things[label] if isthing else self.categories.stuff[label - 1]
            if area > 0 or row + 1 in present:
                table.append({"id": row + 1, "category_id": category.id, "area": area, "iscrowd": int(crowd)})
        return table

    def _label_maps(self, sample: Sample, result: PanopticResult) -> tuple[Tensor, Tensor, Tensor]:
        """Returns maps of the true class, the predicted class (things and stuff) and the true instance number."""
        things, count = len(self.categories.things), len(sample.label)
        true_label = np.full(count + 1, IGNORE, np.int32)
        true_label[1:] = torch.where(sample.isthing, sample.label, things - 1 + sample.label).numpy()
        number = np.arange(count + 1, dtype=np.int32)
        number[1:][(~sample.isthing | sample.crowd).numpy()] = 0
        label = np.full(max((s.id for s in result.segments), default=0) + 1, IGNORE, np.int32)
        for segment in result.segments:
            label[segment.id] = segment.class_index + (0 if segment.isthing else things)
        truth, found = runs_of(sample.segments.numpy()), runs_of(result.panoptic.numpy())
        maps = [
            runs.map_of(table[runs.value], sample.size)
            for runs, table in ((truth, true_label), (found, label), (truth, number))
        ]
        return torch.from_numpy(maps[0]), torch.from_numpy(maps[1]), torch.from_numpy(maps[2])

    def merge(self, other: Evaluation) -> None:
        """Adds the images of another object; the result does not depend on the order."""
        self.panoptic.merge(other.panoptic)
        if self.semantic is not None and other.semantic is not None:
            self.semantic.merge(other.semantic)
        if self.instances is not None and other.instances is not None:
            self.instances.merge(other.instances)
        if self.parsing is not None and other.parsing is not None:
            self.parsing.merge(other.parsing)
        self.images += other.images
        self.skipped += other.skipped

    def result(self) -> dict[str, Any]:
        """Computes the metrics over all images so far.

        Returns:
            A dictionary with

            - "summary": PQ, SQ and RQ, also as PQ_things, PQ_stuff and so on; mIoU, mIoU_annotated and fIoU of the
              semantic branch (see `SemanticQuality`); iIoU on Cityscapes; box AP and mask AP. Metrics that were not
              requested, or whose branch the network lacks, are absent. Values are from 0 to 100, or NaN if nothing was
              counted.
            - "per_class": PQ, SQ and RQ from 0 to 100, and the counts TP, FP and FN, of each category that occurs. The
              keys are names; where several categories have one name, "name (id 7)".
            - "images": The number of images that were compared.
            - "skipped": A message for each image that could not be read.

        Note:
            iIoU (cityscapesScripts, evalPixelLevelSemanticLabeling.py) is computed for the things in the panoptic map,
            because the semantic branch has one label for all things. Void pixels of that map count as missed.
        """
        panoptic = self.panoptic.result()
        summary: dict[str, float] = {}
        for kind in KINDS:
            occurs = panoptic[kind]["n"] > 0
            summary |= {
                name + SUFFIX[kind]: panoptic[kind][name.lower()] if occurs else math.nan
                for name in QUALITIES
            }
        if self.semantic is not None:
            semantic = self.semantic.result()
            summary |= {name: semantic[name.lower()] for name in ("mIoU", "mIoU_annotated", "fIoU")}
        if self.parsing is not None:
            summary["iIoU"] = self.parsing.result()["iiou"]
        if self.instances is not None:
            summary |= self.instances.result()
        tallies, names = self.panoptic.tallies(), self.categories.unique_names()
        per_class = {}
        for category in self.categories.all:
            tally = tallies[category.id]
            quality = tally.quality()
            if quality is not None:
                figures = {name.upper(): 100 * value for name, value in quality.items()}
                per_class[names[category.id]] = {**figures, "TP": tally.tp, "FP": tally.fp, "FN": tally.fn}
        return {
            "summary": {name: 100 * value for name, value in summary.items()},
            "per_class": per_class,
            "images": self.images,
            "skipped": sorted(self.skipped),
        }


class _AnnotatedImages(Dataset["Sample | Unreadable"]):
    """Annotated images by position; an image that cannot be read is an `Unreadable`."""

    def __init__(self, dataset: PanopticDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | Unreadable:
        try:
            return self.dataset.load(index)
        except (DataError, OSError) as error:
            return Unreadable(str(error))


@contextmanager
def _loading(
    dataset: PanopticDataset, chosen: range, workers: int
) -> Iterator[Iterator[Sample | Unreadable]]:
    """Yields an iterator over the chosen images; ends its worker processes at the end of the `with` block."""
    samples = start_workers(
        DataLoader(
            _AnnotatedImages(dataset),
            batch_size=None,
            sampler=chosen,
            num_workers=workers if len(chosen) > 1 else 0,
            collate_fn=pack_in_worker,
            worker_init_fn=prepare_worker,
        )
    )
    try:
        yield samples
    finally:
        close_workers(samples)


def evaluate(
    predictor: Predictor,
    dataset: PanopticDataset,
    *,
    with_ap: bool = True,
    quiet: bool = False,
    workers: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Predicts every image of a data set and compares the predictions with the annotations.

    In a process group every process must call this. Each of the W ranks takes every W-th image, and all ranks return
    the metrics over all images. They are bit-identical to the metrics that a single process computes from the same
    predictions.

    Args:
        predictor: Predictor of a network with the classes of the data set.
        dataset: Annotated images.
        with_ap: Whether to compute AP, which needs pycocotools.
        quiet: Whether to hide the progress bar.
        workers: Number of processes that load images ahead; 0 loads in this process. None means one for a network on
            the CPU and four for a network on a GPU.
        skip_bad: Whether to skip images that cannot be read, and list them in the result, instead of raising an error.

    Returns:
        See `Evaluation.result`.

    Raises:
        ValueError: If the network has other classes than the data set, the data set has no images, or AP is wanted
            and the predictor leaves out instances.
        DataError: If an image or annotation is missing or damaged; the message names the file.
        UserError: If the number of workers is out of range, or the worker processes cannot be started.
    """
    if predictor.categories != dataset.categories:
        raise ValueError(
            f"dataset: its classes ({dataset.categories.name}) are not the network's ({predictor.categories.name}): "
            + dataset.categories.compared_with(predictor.categories)
            + ". Evaluate a network that was trained on these classes"
        )
    if len(dataset) == 0:
        raise ValueError("dataset: there are no images in it")
    if with_ap and "instance" in predictor.tasks and predictor.instances != "all":
        raise ValueError(
            'predictor: AP counts all instances, but this Predictor has instances="panoptic"; make it with '
            'instances="all", or pass with_ap=False'
        )
    rank, count = rank_and_world_size()
    if workers is None:
        workers = 1 if predictor.device.type == "cpu" else 4
    check_workers(workers)
    mine = range(rank, len(dataset), count)
    evaluation = Evaluation(dataset.categories, with_ap, predictor.tasks)
    bar = tqdm(total=len(mine), unit="image", disable=quiet or rank > 0, leave=False)
    with bar, _loading(dataset, mine, workers) as samples:
        for number, sample in zip(mine, samples, strict=True):
            if isinstance(sample, Unreadable):
                if not skip_bad:
                    raise DataError(sample.message)
                evaluation.skipped.append(sample.message)
            else:
                image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
                evaluation.add(number, sample, predictor(image))
            bar.update()
    parts = gather(evaluation)
    for part in parts[1:]:
        evaluation.merge(part)
    return broadcast(evaluation.result() if parts else {})
