"""Stands in for a `Predictor` of a perfect network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.sample import IGNORE, Sample, make_target
from panfpn_fast.inference import Instances, PanopticResult
from panfpn_fast.inference.result import Segment


class TruePredictor:
    """Knows the annotation of each image; crowd regions and void are left out, as no network finds them.

    Args:
        dataset: Whose images will be asked for; no two of them are equal.
    """

    tasks: tuple[str, ...] = ("instance", "semantic")

    def __init__(self, dataset: PanopticDataset) -> None:
        self.categories = dataset.categories
        self.device = torch.device("cpu")
        samples = (dataset.load(index) for index in range(len(dataset)))
        self._samples = {sample.image.numpy().tobytes(): sample for sample in samples}

    def __call__(self, image: np.ndarray) -> PanopticResult:
        return self.answer(self._samples[np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()])

    def answer(self, sample: Sample) -> PanopticResult:
        """The annotation in the form of a prediction."""
        ids = [row + 1 for row in torch.nonzero(~sample.crowd)[:, 0].tolist()]
        areas = torch.bincount(sample.segments.flatten(), minlength=len(sample.label) + 1)
        segments = []
        for id_ in ids:
            isthing, label = bool(sample.isthing[id_ - 1]), int(sample.label[id_ - 1])
            index = label if isthing else label - 1
            category = (self.categories.things if isthing else self.categories.stuff)[index]
            if areas[id_]:
                segments.append(
                    Segment(id_, category.id, category.name, isthing, index, 0.9 * isthing, int(areas[id_]))
                )
        panoptic = torch.where(torch.isin(sample.segments, torch.tensor(ids)), sample.segments, 0)
        target = make_target(sample)
        instances = Instances(
            target.boxes,
            torch.linspace(0.99, 0.9, len(target.classes)),
            target.classes,
            _mask_probs(target.boxes, target.instances),
        )
        semantic = torch.where(target.semantic == IGNORE, 0, target.semantic)
        return PanopticResult(panoptic, segments, instances, semantic, self.categories.name)


def _mask_probs(boxes: Tensor, instances: Tensor) -> Tensor:
    """Masks large enough that pasting gives back every pixel: at least two cells for each, by the nearest."""
    corners = boxes.long().tolist()
    side = 2 * max((max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners), default=14)
    masks = torch.zeros(len(corners), side, side)
    for n, (x1, y1, x2, y2) in enumerate(corners):
        own = (instances[y1:y2, x1:x2] == n + 1).float()
        masks[n] = F.interpolate(own[None, None], (side, side), mode="nearest-exact")[0, 0]
    return masks
