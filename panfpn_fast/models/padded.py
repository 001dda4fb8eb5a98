"""The network in static shapes: what torch.export, torch.compile and CUDA graphs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.boxes import clip_boxes, nonempty, scale_boxes
from panfpn_fast.models.layers import at_least_float32
from panfpn_fast.models.panoptic_fpn import (
    Instances,
    PanopticFPN,
    PanopticOutput,
    merge_settings,
)
from panfpn_fast.ops import PanopticSegments
from panfpn_fast.ops._checks import int_pair

SEGMENT = "segment_"
"""What the names of the columns of the table of segments begin with."""


class PaddedPanopticFPN(nn.Module):
    """Predicts what a :class:`PanopticFPN` does, in tensors whose shapes depend on nothing but the images' shape.

    The network and its weights are shared, not copied.

    Args:
        model: a network in evaluation mode.
        output_size: height and width of the results; None: those of the images.
        max_candidates: how many pairs of a proposal and a class enter NMS of each image, the best ones; of pairs with
            a probability above ``score_threshold`` there are usually some hundreds. Where more could have changed the
            result, ``overflow`` says so.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: it is in training mode, or another argument has a value that it cannot take.

    Note:
        No host sync, no shape that depends on data: a call can be captured in a CUDA graph, and
        ``torch.compile(..., fullgraph=True)`` and ``torch.export.export`` take the module whole.

    Example:
        >>> model = PanopticFPN(backbone="resnet18", num_things=2, num_stuff=3).eval()
        >>> found = PaddedPanopticFPN(model)(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
        >>> found["panoptic"].shape, found["boxes"].shape
        (torch.Size([1, 64, 96]), torch.Size([1, 100, 4]))
        >>> [output] = unpad(found)
        >>> len(output.boxes) == int(found["count"])
        True
    """

    def __init__(
        self,
        model: PanopticFPN,
        output_size: tuple[int, int] | None = None,
        max_candidates: int = 4096,
    ) -> None:
        super().__init__()
        if not isinstance(model, PanopticFPN):
            raise TypeError(f"model: expected a PanopticFPN, got {type(model).__name__}")
        if model.training:
            raise ValueError(
                "model: expected a network in evaluation mode, got one in training mode; call .eval()"
            )
        if output_size is not None:
            output_size = int_pair("output_size", output_size, 1)
        if isinstance(max_candidates, bool) or not isinstance(max_candidates, int) or max_candidates < 1:
            raise ValueError(f"max_candidates: expected an integer of at least 1, got {max_candidates!r}")
        self.model = model
        self.output_size = output_size
        self.max_candidates = max_candidates
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predicts.

        Args:
            images: RGB images [N, 3, H, W] of one size, already resized to what the network should see, with values
                from 0 to 255, uint8 or floating, on the network's device.

        Returns:
            With D = ``detections_per_image`` (0 of a network without the instance branch) and S = D + ``num_stuff``:

            - ``panoptic``: int32 [N, height, width], each pixel's segment id, 0 = void.
            - ``segment_id``, ``segment_isthing``, ``segment_label``, ``segment_score``, ``segment_area``,
              ``segment_instance``: [N, S], the table of segments in the columns of ``ops.panoptic_merge_padded``.
            - ``segment_count``: int64 [N], how many rows of it are segments.
            - ``boxes`` [N, D, 4], ``scores`` [N, D], ``classes`` int64 [N, D], ``mask_probs`` [N, D, 28, 28]:
              detections by descending score and zeros behind them; see :class:`PanopticOutput`.
            - ``count``: int64 [N], how many of them are detections.
            - ``semantic``: [N, height, width], 0 = "other" (all things), 1.. = stuff.
            - ``overflow``: bool [N], whether there were more candidates than ``max_candidates`` and
              :class:`PanopticFPN` might find other instances.

        Raises:
            TypeError: ``images`` is no tensor, or neither uint8 nor floating.
            ValueError: it has another shape or no pixels.
        """
        _check_images(images)
        config = self.model.config
        size = (images.shape[2], images.shape[3])
        output_size = self.output_size or size
        bottom, right = (-side % config.size_divisibility for side in size)
        batch = F.pad(self.model.normalize(images).to(self.model.dtype), (0, right, 0, bottom))
        features = self.model.features(batch)
        found = self._instances(features, batch, size, output_size)
        every = [size] * len(images), [output_size] * len(images)
        semantic = torch.stack(self.model.labels(features, *every))
        merged = [self._merge(found, semantic, i) for i in range(len(images))]
        tables = {name: torch.stack([one[name] for one in merged]) for name in merged[0]}
        return {**tables, **found, "semantic": semantic}

    def _instances(
        self,
        features: Mapping[str, Sequence[Tensor]],
        batch: Tensor,
        size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """What the instance branch has to say, at the output's size."""
        model = self.model
        if "instance" not in model.config.tasks:
            return _no_instances(batch, 2 * model.config.mask_pool_size)
        pyramid = features["instance"]
        sizes = [size] * len(batch)
        objectness, moves = model.rpn(pyramid)
        anchors = model.rpn.anchors(pyramid)
        proposals, proposed = model.rpn.propose_padded(anchors, objectness, moves, sizes)
        class_logits, deltas = model.box_head(pyramid, list(proposals.unbind()))
        found = model.box_head.detect_padded(
            class_logits, deltas, proposals, proposed, size, self.max_candidates
        )
        boxes = clip_boxes(scale_boxes(found.boxes, size, output_size), output_size)
        # What has no area at the output's size goes, and what follows moves up.
        keep = found.found & nonempty(boxes)
        order = keep.logical_not().sort(dim=1, stable=True).indices
        keep = keep.gather(1, order)

        def moved_up(values: Tensor) -> Tensor:
            rows = order if values.ndim == 2 else order[..., None].expand_as(values)
            return _masked(values.gather(1, rows), keep)

        seen, classes = moved_up(found.boxes), moved_up(found.classes)
        masks = model.mask_head(pyramid, list(seen.unbind()), classes.flatten()).sigmoid()
        return {
            "boxes": moved_up(boxes),
            "scores": moved_up(found.scores),
            "classes": classes,
            "mask_probs": _masked(masks.unflatten(0, keep.shape), keep),
            "count": keep.sum(dim=1),
            "overflow": found.overflow,
        }

    def _merge(self, found: Mapping[str, Tensor], semantic: Tensor, image: int) -> dict[str, Tensor]:
        """One image's panoptic map and table."""
        config = self.model.config
        scores = found["scores"][image]
        rows = torch.arange(len(scores), device=scores.device)
        panoptic, segments, count = ops.panoptic_merge_padded(
            found["mask_probs"][image],
            found["boxes"][image],
            # Below any threshold what is no detection.
            scores.masked_fill(rows >= found["count"][image], -torch.inf),
            found["classes"][image],
            semantic[image],
            (semantic.shape[1], semantic.shape[2]),
            max_segments=len(scores) + config.num_stuff,
            **merge_settings(config),
        )
        columns = {f"{SEGMENT}{name}": column for name, column in segments._asdict().items()}
        return {"panoptic": panoptic, **columns, f"{SEGMENT}count": count}


def unpad(outputs: Mapping[str, Tensor]) -> list[PanopticOutput]:
    """Cuts off the padding: from what :class:`PaddedPanopticFPN` returns to what :class:`PanopticFPN` returns.

    Args:
        outputs: of the module, or of a program that was exported from it.

    Returns:
        One :class:`PanopticOutput` per image, whose tensors are views.

    Note:
        One host sync, for the two counts.
    """
    counts = torch.stack((outputs[f"{SEGMENT}count"], outputs["count"]), dim=1).tolist()
    return [
        PanopticOutput(
            outputs["panoptic"][i],
            PanopticSegments(*(outputs[f"{SEGMENT}{name}"][i, :rows] for name in PanopticSegments._fields)),
            **{name: outputs[name][i, :count] for name in Instances._fields},
            semantic=outputs["semantic"][i],
        )
        for i, (rows, count) in enumerate(counts)
    ]


def _masked(values: Tensor, keep: Tensor) -> Tensor:
    """Zeros where ``keep`` [N, D] is not set in ``values`` [N, D, ...]."""
    return values.masked_fill(~keep.reshape(*keep.shape, *[1] * (values.ndim - 2)), 0)


def _no_instances(batch: Tensor, side: int) -> dict[str, Tensor]:
    images = len(batch)
    scores = batch.new_zeros(images, 0, dtype=at_least_float32(batch.dtype))
    return {
        "boxes": scores.new_zeros(images, 0, 4),
        "scores": scores,
        "classes": scores.to(torch.int64),
        "mask_probs": scores.new_zeros(images, 0, side, side),
        "count": scores.new_zeros(images, dtype=torch.int64),
        "overflow": scores.new_zeros(images, dtype=torch.bool),
    }


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images: expected shape [N, 3, H, W], got {list(images.shape)}")
