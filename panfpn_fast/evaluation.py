"""Evaluates a network on an annotated data set: panoptic quality, IoU of label maps, box and mask AP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from panfpn_fast.data.categories import Categories
from panfpn_fast.data.files import DataError
from panfpn_fast.data.loader import PanopticDataset, Unreadable
from panfpn_fast.data.sample import IGNORE, Sample, runs_of, semantic_map
from panfpn_fast.distributed import gather_to_first, place, tell_all
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.metrics import PanopticQuality, SemanticQuality, match_segments
from panfpn_fast.metrics.coco_ap import AP_FIGURES, InstanceAP
from panfpn_fast.metrics.semantic import CITYSCAPES_INSTANCE_SIZES

__all__ = ["Evaluation", "evaluate", "format_table", "without_nan"]

_QUALITIES = ("PQ", "SQ", "RQ")
_KINDS = ("All", "Things", "Stuff")
_END = {"All": "", "Things": "_things", "Stuff": "_stuff"}


class Evaluation:
    """Collects the figures of images; can be pickled, so that processes can share the work.

    Args:
        categories: Of the data set and of the network.
        with_ap: Whether AP is wanted, which needs pycocotools.
        tasks: The network's branches: AP is that of "instance", mIoU and fIoU are those of "semantic".
    """

    def __init__(
        self,
        categories: Categories,
        with_ap: bool = True,
        tasks: Sequence[str] = ("instance", "semantic"),
    ) -> None:
        self.categories = categories
        self.panoptic = PanopticQuality({category.id: category.isthing for category in categories.all})
        stuff = len(categories.stuff) + 1
        self.semantic = SemanticQuality(stuff, IGNORE) if "semantic" in tasks else None
        self.instances = InstanceAP(categories) if with_ap and "instance" in tasks else None
        sizes = CITYSCAPES_INSTANCE_SIZES if categories.name == "cityscapes" else {}
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
            number: The image's position in the data set.
            sample: The annotation.
            result: The prediction.
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

    def _table(self, sample: Sample) -> list[dict[str, int]]:
        table = []
        columns = (sample.isthing, sample.label, sample.crowd, sample.area)
        for row, (isthing, label, crowd, area) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            category = self.categories.things[label] if isthing else self.categories.stuff[label - 1]
            if area > 0:  # else nothing of it is left in the map
                table.append({"id": row + 1, "category_id": category.id, "area": area, "iscrowd": int(crowd)})
        return table

    def _label_maps(self, sample: Sample, result: PanopticResult) -> tuple[Tensor, Tensor, Tensor]:
        """The true and the predicted class of each pixel, things and stuff alike, and the true instances' numbers."""
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
        """Adds the images of another one; the figures do not depend on the order."""
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
        """The figures.

        Returns:
            "summary": PQ, SQ, RQ, the same as PQ_things, PQ_stuff and so on, mIoU and fIoU of the semantic branch, iIoU
            on Cityscapes, and the box and mask AP, those that were asked for and that the network has branches for,
            from 0 to 100, NaN where there is nothing to judge; "per_class":
            PQ, SQ and RQ from 0 to 100 and the counts TP, FP and FN of each category that occurs; "images": how
            many were compared; "skipped": a message for each that could not be read.

        Note:
            iIoU (cityscapesScripts, evalPixelLevelSemanticLabeling.py) is that of the things in the panoptic map, of
            which void pixels count as missed, because the semantic branch has one label for all things.
        """
        panoptic = self.panoptic.result()
        summary: dict[str, float] = {}
        for kind in _KINDS:
            summary |= {name + _END[kind]: panoptic[kind][name.lower()] for name in _QUALITIES}
        if self.semantic is not None:
            semantic = self.semantic.result()
            summary |= {"mIoU": semantic["miou"], "fIoU": semantic["fiou"]}
        if self.parsing is not None:
            summary["iIoU"] = self.parsing.result()["iiou"]
        if self.instances is not None:
            summary |= self.instances.result()
        tallies = self.panoptic.tallies()
        per_class = {}
        for category in self.categories.all:
            tally = tallies[category.id]
            quality = tally.quality()
            if quality is not None:
                figures = {name.upper(): 100 * value for name, value in quality.items()}
                per_class[category.name] = {**figures, "TP": tally.tp, "FP": tally.fp, "FN": tally.fn}
        return {
            "summary": {name: 100 * value for name, value in summary.items()},
            "per_class": per_class,
            "images": self.images,
            "skipped": sorted(self.skipped),
        }


class _Samples(Dataset["Sample | Unreadable"]):
    """Annotated images by their position; see `Unreadable`."""

    def __init__(self, dataset: PanopticDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | Unreadable:
        try:
            return self.dataset.load(index)
        except (DataError, OSError) as error:
            return Unreadable(str(error))


def _itself(item: Any) -> Any:
    return item


def _load(dataset: PanopticDataset, chosen: range, workers: int) -> Iterator[Sample | Unreadable]:
    # Worker processes of a DataLoader compute with one thread each.
    return iter(
        DataLoader(
            _Samples(dataset),
            batch_size=None,
            sampler=chosen,
            num_workers=workers if len(chosen) > 1 else 0,
            collate_fn=_itself,
        )
    )


def evaluate(
    predictor: Predictor,
    dataset: PanopticDataset,
    *,
    with_ap: bool = True,
    quiet: bool = False,
    workers: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Predicts every image of a data set and compares.

    In a process group every process must call this: rank r of W takes every W-th image, and all get the figures of all
    images, which are those that one process gets from the same predictions, to the last bit.

    Args:
        predictor: Of a network with the data set's classes.
        dataset: Annotated images.
        with_ap: Whether AP is wanted, which needs pycocotools.
        quiet: No progress bar.
        workers: Processes that read images ahead; 0: none. None: one for a network on the CPU, four for one on a GPU.
        skip_bad: An image that cannot be read is left out and named in the result, not an error.

    Returns:
        See `Evaluation.result`.

    Raises:
        ValueError: The network has other classes, or there are no images.
        DataError: An image or annotation is missing or damaged; named.
    """
    if predictor.categories != dataset.categories:
        raise ValueError(
            f"dataset: its classes ({dataset.categories.name}) are not the network's ({predictor.categories.name})"
        )
    if len(dataset) == 0:
        raise ValueError("dataset: there are no images in it")
    rank, count = place()
    if workers is None:
        workers = 1 if predictor.device.type == "cpu" else 4
    mine = range(rank, len(dataset), count)
    evaluation = Evaluation(dataset.categories, with_ap, predictor.tasks)
    bar = tqdm(total=len(mine), unit="image", disable=quiet or rank > 0, leave=False)
    with bar:
        for number, sample in zip(mine, _load(dataset, mine, workers), strict=True):
            if isinstance(sample, Unreadable):
                if not skip_bad:
                    raise DataError(sample.message)
                evaluation.skipped.append(sample.message)
            else:
                image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
                evaluation.add(number, sample, predictor(image))
            bar.update()
    parts = gather_to_first(evaluation)
    for part in parts[1:]:
        evaluation.merge(part)
    return tell_all(evaluation.result() if parts else {})


def without_nan(figures: Any) -> Any:
    """The same nested dictionaries and lists with None, JSON's null, for every NaN, which JSON does not know."""
    if isinstance(figures, dict):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and math.isnan(figures) else figures


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:7d}"
    return f"{'-':>7}" if math.isnan(value) else f"{value:7.2f}"


def format_table(result: dict[str, Any]) -> str:
    """The figures as text: the panoptic quality of all, things and stuff, the other figures, and each class.

    Example:
        >>> summary = {"PQ": 50.0, "SQ": 75.0, "RQ": 66.7, "PQ_things": 50.0, "SQ_things": 75.0, "RQ_things": 66.7,
        ...            "PQ_stuff": 0.0, "SQ_stuff": 0.0, "RQ_stuff": 0.0, "mIoU": float("nan"), "fIoU": 80.0}
        >>> dog = {"PQ": 50.0, "SQ": 75.0, "RQ": 66.7, "TP": 1, "FP": 1, "FN": 0}
        >>> print(format_table({"summary": summary, "per_class": {"dog": dog}, "images": 1, "skipped": []}))
                    PQ      SQ      RQ
        All      50.00   75.00   66.70
        Things   50.00   75.00   66.70
        Stuff     0.00    0.00    0.00
        <BLANKLINE>
        mIoU       -    fIoU   80.00
        <BLANKLINE>
                    PQ      SQ      RQ      TP      FP      FN
        dog      50.00   75.00   66.70       1       1       0
        <BLANKLINE>
        1 images
    """
    summary, per_class = dict(result["summary"]), result["per_class"]
    width = max(map(len, (*_KINDS, *per_class)))

    def table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> list[str]:
        lines = [" ".join((" " * width, *(f"{column:>7}" for column in columns)))]
        return lines + [" ".join((f"{name:{width}}", *map(_cell, values))) for name, values in rows.items()]

    lines = table(
        _QUALITIES,
        {kind: [summary.pop(name + _END[kind]) for name in _QUALITIES] for kind in _KINDS},
    )
    if "box_AP" in summary:
        rows = {
            kind: [summary.pop(f"{kind.lower()}_{name}") for name in AP_FIGURES] for kind in ("Box", "Mask")
        }
        lines += ["", *table(AP_FIGURES, rows)]
    if summary:
        lines += ["", "    ".join(f"{name} {_cell(value)}" for name, value in summary.items())]
    columns = (*_QUALITIES, "TP", "FP", "FN")
    rows = {name: [found[column] for column in columns] for name, found in per_class.items()}
    lines += ["", *table(columns, rows)]
    lines += ["", f"{result['images']} images"]
    if result["skipped"]:
        lines[-1] += f", and {len(result['skipped'])} that could not be read:"
        lines += result["skipped"]
    return "\n".join(lines)
