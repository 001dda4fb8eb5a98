"""A stand-in for a `Predictor` with a perfect network."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.data.sample import IGNORE, Sample, make_target
from panfpn_fast.inference import Instances, PanopticResult, Segment


class TruePredictor:
    """Predicts the annotation of each image, without crowd regions and void, which no network predicts.

    Args:
        dataset: The data set of the images; no two images may be equal.
    """

    tasks: tuple[str, ...] = ("instance", "semantic")
    short_edge, max_edge = 800, 1333
    instances = "all"

    def __init__(self, dataset: PanopticDataset) -> None:
        self.categories = dataset.categories
        self.device = torch.device("cpu")
        samples = (dataset.load(index) for index in range(len(dataset)))
        self._samples = {sample.image.numpy().tobytes(): sample for sample in samples}

    def __call__(self, image: np.ndarray) -> PanopticResult:
        return self.answer(self._samples[np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()])

    def answer(self, sample: Sample) -> PanopticResult:
        """Returns the annotation as a prediction."""
        ids = [row + 1 for row in torch.nonzero(~sample.crowd)[:, 0].tolist()]
        areas = torch.bincount(sample.segments.flatten(), minlength=len(sample.label) + 1)
        segments = []
        for id_ in ids:
            isthing, label = bool(sample.isthing[id_ - 1]), int(sample.label[id_ - 1])
            index = label if isthing else label - 1
            category = (self.categories.things if isthing else self.categories.stuff)[index]
            if areas[id_]:
                score = 0.9 if isthing else None
                segments.append(
                    Segment(id_, category.id, category.name, isthing, index, score, int(areas[id_]))
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
        return PanopticResult(panoptic, segments, instances, semantic, self.categories)


def _mask_probs(boxes: Tensor, instances: Tensor) -> Tensor:
    """Returns masks that reproduce every pixel when pasted.

    They are resized by nearest neighbour, to at least two mask pixels for each image pixel along both axes.
    """
    corners = boxes.long().tolist()
    side = 2 * max((max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners), default=14)
    masks = torch.zeros(len(corners), side, side)
    for n, (x1, y1, x2, y2) in enumerate(corners):
        own = (instances[y1:y2, x1:x2] == n + 1).float()
        masks[n] = F.interpolate(own[None, None], (side, side), mode="nearest-exact")[0, 0]
    return masks
