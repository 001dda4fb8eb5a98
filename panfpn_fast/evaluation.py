"""Evaluates a network on an annotated data set: panoptic quality, IoU of label maps, box and mask AP."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tqdm import tqdm

from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.sample import IGNORE, Sample, make_target
from panfpn_fast.inference import PanopticResult, Predictor
from panfpn_fast.metrics import PanopticQuality, SemanticQuality, match_segments
from panfpn_fast.metrics.coco_ap import InstanceAP

__all__ = ["Evaluation", "evaluate", "format_table"]


class Evaluation:
    """Collects the figures of images.

    Args:
        dataset: Whose annotations are compared with.
        with_ap: Whether AP is wanted, which needs pycocotools.
    """

    def __init__(self, dataset: PanopticDataset, with_ap: bool = True) -> None:
        self.categories = dataset.categories
        self.panoptic = PanopticQuality({category.id: category.isthing for category in self.categories.all})
        self.semantic = SemanticQuality(len(self.categories.stuff) + 1, IGNORE)
        self.instances = InstanceAP(self.categories) if with_ap else None

    def add(self, sample: Sample, result: PanopticResult) -> None:
        """Compares a prediction with its annotation."""
        found = match_segments(
            np.ascontiguousarray(sample.segments.numpy()),
            self._table(sample),
            np.ascontiguousarray(result.panoptic.numpy()),
            [{"id": segment.id, "category_id": segment.category_id} for segment in result.segments],
            self.panoptic.categories,
            sample.image_id,
        )
        self.panoptic.add(found)
        self.semantic.add(make_target(sample).semantic, result.semantic)
        if self.instances is not None:
            self.instances.add(sample, result.instances)

    def _table(self, sample: Sample) -> list[dict[str, int]]:
        table = []
        columns = (sample.isthing, sample.label, sample.crowd, sample.area)
        for row, (isthing, label, crowd, area) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            category = self.categories.things[label] if isthing else self.categories.stuff[label - 1]
            if area > 0:  # else nothing of it is left in the map
                table.append({"id": row + 1, "category_id": category.id, "area": area, "iscrowd": int(crowd)})
        return table

    def result(self) -> dict[str, Any]:
        """The figures.

        Returns:
            "summary": PQ, SQ, RQ, PQ_things, PQ_stuff, mIoU, fIoU and AP, from 0 to 100; "per_class": the "pq", "sq"
            and "rq" of each category, from 0 to 1.
        """
        panoptic, semantic = self.panoptic.result(), self.semantic.result()
        summary = {name: panoptic["All"][name.lower()] for name in ("PQ", "SQ", "RQ")}
        summary |= {f"PQ_{kind.lower()}": panoptic[kind]["pq"] for kind in ("Things", "Stuff")}
        summary |= {"mIoU": semantic["miou"], "fIoU": semantic["fiou"]}
        if self.instances is not None:
            summary |= self.instances.result()
        names = {category.id: category.name for category in self.categories.all}
        return {
            "summary": {name: 100 * value for name, value in summary.items()},
            "per_class": {names[category]: quality for category, quality in panoptic["per_class"].items()},
        }


def evaluate(
    predictor: Predictor, dataset: PanopticDataset, *, with_ap: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """Predicts every image of a data set and compares.

    Args:
        predictor: Of a network with the data set's classes.
        dataset: Annotated images.
        with_ap: Whether AP is wanted, which needs pycocotools.
        quiet: No progress bar.

    Returns:
        See `Evaluation.result`.

    Raises:
        ValueError: The network has other classes.
    """
    if predictor.categories != dataset.categories:
        raise ValueError(
            f"dataset: its classes ({dataset.categories.name}) are not the network's ({predictor.categories.name})"
        )
    evaluation = Evaluation(dataset, with_ap)
    for index in tqdm(range(len(dataset)), unit="image", disable=quiet, leave=False):
        sample = dataset.load(index)
        image = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        evaluation.add(sample, predictor(image))
    return evaluation.result()


def format_table(result: dict[str, Any]) -> str:
    """The summary, and each category that occurs, as text."""
    summary = result["summary"]
    lines = ["  ".join(f"{name:>9}" for name in summary)]
    lines.append(
        "  ".join("        -" if math.isnan(value) else f"{value:9.2f}" for value in summary.values())
    )
    width = max((len(name) for name in result["per_class"]), default=0)
    lines += ["", f"{'':{width}}  {'PQ':>6} {'SQ':>6} {'RQ':>6}"]
    for name, quality in result["per_class"].items():
        if quality["rq"] > 0 or quality["pq"] > 0:
            row = " ".join(f"{100 * quality[key]:6.2f}" for key in ("pq", "sq", "rq"))
            lines.append(f"{name:{width}}  {row}")
    return "\n".join(lines)
