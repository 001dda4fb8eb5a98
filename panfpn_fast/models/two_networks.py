"""Two separate networks, one for things and one for stuff: what the paper compares the shared one with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from panfpn_fast.models.config import TASKS, PanopticFPNConfig
from panfpn_fast.models.panoptic_fpn import Instances, PanopticFPN, PanopticOutput, merge

_SAME = ("num_things", "num_stuff", "dataset", "resize")


class TwoNetworks(nn.Module):
    """Takes instances from one network and stuff from another, each with features of its own.

    It is called as a :class:`PanopticFPN` is, so a `Predictor` takes it too.

    Args:
        instance: a network with the instance branch; its thresholds decide the merging.
        semantic: a network with the semantic branch.

    Raises:
        TypeError: an argument is no :class:`PanopticFPN`.
        ValueError: a network lacks its branch, or the two have different classes or resizes.

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
                    f"{name}: expected a network with that branch, it has {network.config.tasks}"
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
        """Where the parameters are."""
        return self.instance.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self.instance.dtype

    @torch.no_grad()
    def forward(
        self, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[PanopticOutput]:
        """Predicts; see :meth:`PanopticFPN.forward`."""
        if len(images) == 0:
            return []
        batch, sizes = self.instance.prepare_outputs(images, output_sizes)
        features = self.instance.features(batch.images, ("instance",))
        found = self.instance.instances(features, batch.sizes, sizes)
        batch = self.semantic.prepare(images)
        features = self.semantic.features(batch.images, ("semantic",))
        labels = self.semantic.labels(features, batch.sizes, sizes)
        return [merge(self.config, *each) for each in zip(found, labels, strict=True)]


def merge_outputs(
    config: PanopticFPNConfig, instance: Sequence[PanopticOutput], semantic: Sequence[PanopticOutput]
) -> list[PanopticOutput]:
    """Merges what two networks have predicted, at the same output sizes, as :class:`TwoNetworks` does.

    Args:
        config: the thresholds.
        instance: predictions whose instances count.
        semantic: predictions of the same images whose label maps count.

    Returns:
        One prediction per image.

    Raises:
        ValueError: there are fewer of one than of the other, or their sizes differ.
    """
    if len(instance) != len(semantic):
        raise ValueError(
            f"semantic: expected {len(instance)} predictions, as of instance, got {len(semantic)}"
        )
    merged = []
    for i, (things, stuff) in enumerate(zip(instance, semantic, strict=True)):
        if things.panoptic.shape != stuff.panoptic.shape:
            raise ValueError(
                f"semantic[{i}]: expected the size of instance[{i}], {list(things.panoptic.shape)}, "
                f"got {list(stuff.panoptic.shape)}"
            )
        found = Instances(things.boxes, things.scores, things.classes, things.mask_probs)
        merged.append(merge(config, found, stuff.semantic))
    return merged
