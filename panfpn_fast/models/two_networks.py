"""Two separate networks, one for things and one for stuff, with which the paper compares the shared network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast.models.config import TASKS, PanopticFPNConfig
from panfpn_fast.models.outputs import InstanceOutput, PanopticOutput
from panfpn_fast.models.panoptic_fpn import PanopticFPN, Wanted, check_wanted, merge

_SAME = ("num_things", "num_stuff", "categories", "resize", "short_edge", "max_edge")


class TwoNetworks(nn.Module):
    """Combines the instances of one network with the stuff of another; each computes its own features.

    It has the interface of a `PanopticFPN`, so a `Predictor` accepts it.

    Args:
        instance: A network with the instance branch. Its thresholds apply to merging.
        semantic: A network with the semantic branch.

    Raises:
        TypeError: If an argument is not a `PanopticFPN`.
        ValueError: If a network lacks its branch, or the networks differ in classes or resizing.

    Example:
        >>> instance = PanopticFPN(backbone="resnet18", num_things=2, num_stuff=3, tasks=("instance",))
        >>> semantic = PanopticFPN(backbone="resnet18", num_things=2, num_stuff=3, tasks=("semantic",))
        >>> [output] = TwoNetworks(instance, semantic).eval()([torch.zeros(3, 40, 60, dtype=torch.uint8)])
        >>> output.panoptic.shape
        torch.Size([40, 60])
    """

    def __init__(self, instance: PanopticFPN, semantic: PanopticFPN) -> None:
        super().__init__()
        for name, network in (("instance", instance), ("semantic", semantic)):
            if not isinstance(network, PanopticFPN):
                raise TypeError(f"{name}: expected a PanopticFPN, got {type(network).__name__}")
            if name not in network.config.tasks:
                raise ValueError(
                    f"{name}: expected a network with the task {name!r}, got one with {network.config.tasks}"
                )
        for field in _SAME:
            first, second = getattr(instance.config, field), getattr(semantic.config, field)
            if first != second:
                raise ValueError(
                    f"semantic: expected the instance network's {field}, {first!r}, got {second!r}"
                )
        self.instance = instance
        self.semantic = semantic
        self.config = instance.config.replace(tasks=TASKS)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.instance.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.instance.dtype

    @torch.no_grad()
    def forward(
        self,
        images: Sequence[Tensor],
        output_sizes: Sequence[tuple[int, int]] | None = None,
        instances: Wanted = "all",
    ) -> list[PanopticOutput]:
        """Predicts images; see `PanopticFPN.forward`."""
        check_wanted(instances)
        if len(images) == 0:
            return []
        batch, sizes = self.instance.prepare_outputs(images, output_sizes)
        features = self.instance.features(batch.images, ("instance",))
        found = self.instance.instances(features, batch.sizes, sizes, instances)
        batch = self.semantic.prepare(images)
        features = self.semantic.features(batch.images, ("semantic",))
        labels = self.semantic.labels(features, batch.sizes, sizes)
        return [merge(self.config, *each) for each in zip(found, labels, strict=True)]


def merge_outputs(
    config: PanopticFPNConfig, instance: Sequence[PanopticOutput], semantic: Sequence[PanopticOutput]
) -> list[PanopticOutput]:
    """Merges the predictions of two networks at equal output sizes, as `TwoNetworks` does.

    Args:
        config: The thresholds.
        instance: The predictions that supply the instances.
        semantic: The predictions for the same images that supply the label maps.

    Returns:
        One prediction per image.

    Raises:
        ValueError: If the numbers of predictions or their sizes differ.
    """
    if len(instance) != len(semantic):
        raise ValueError(
            f"semantic: expected {len(instance)} predictions, as many as in instance, got {len(semantic)}"
        )
    merged = []
    for i, (things, stuff) in enumerate(zip(instance, semantic, strict=True)):
        if things.panoptic.shape != stuff.panoptic.shape:
            raise ValueError(
                f"semantic[{i}]: expected the size of instance[{i}], {list(things.panoptic.shape)}, "
                f"got {list(stuff.panoptic.shape)}"
            )
        found = InstanceOutput(things.boxes, things.scores, things.classes, things.mask_probs)
        merged.append(merge(config, found, stuff.semantic))
    return merged
