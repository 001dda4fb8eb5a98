"""The evaluation of a network during its training."""

from __future__ import annotations

import warnings

from panfpn_fast._errors import UserError
from panfpn_fast.data.loader import PanopticDataset
from panfpn_fast.distributed import rank_and_world_size
from panfpn_fast.inference import Predictor
from panfpn_fast.metrics.coco_ap import InstanceAP
from panfpn_fast.metrics.evaluation import evaluate
from panfpn_fast.metrics.tables import format_table
from panfpn_fast.models.panoptic_fpn import PanopticFPN
from panfpn_fast.training.config import TrainConfig
from panfpn_fast.training.evaluations import OF_AP, Evaluated, best_figure
from panfpn_fast.training.gallery import gallery


class Validation:
    """Evaluates a network on a data set, and draws some of its predictions in the first process.

    AP takes long and needs pycocotools, so it is computed only if the best checkpoint is chosen by it.

    Args:
        config: Settings of the run.
        dataset: Annotated images, with the classes of the network.
        model: The network that will be evaluated.

    Raises:
        UserError: If a setting needs a package that is not installed, or the network does not give a figure.
    """

    def __init__(self, config: TrainConfig, dataset: PanopticDataset, model: PanopticFPN) -> None:
        self.config = config
        self.dataset = dataset
        figure = best_figure(config.best_by, model.config)
        self.with_ap = figure in OF_AP
        if self.with_ap:
            try:
                InstanceAP(dataset.categories)
            except ImportError as error:
                raise UserError(f"best_by: {figure}: {error}, or set best_by=PQ") from error

    def __call__(self, model: PanopticFPN) -> Evaluated:
        """Evaluates the network; every process must call this."""
        config = self.config
        # Graphs would keep memory that training needs.
        predictor = Predictor(
            model, model.device, instances="all" if self.with_ap else "panoptic", graphs=False
        )
        found = evaluate(
            predictor, self.dataset, with_ap=self.with_ap, workers=config.workers, skip_bad=config.skip_bad
        )
        pictures = None
        if rank_and_world_size()[0] == 0:
            for message in found["skipped"]:
                warnings.warn(f"skipped {message}", stacklevel=2)
            if config.pictures:
                pictures = gallery(predictor, self.dataset, config.pictures, config.skip_bad)
        return Evaluated(found["summary"], found["per_class"], format_table(found), pictures)
