"""The network with static shapes, for torch.export, torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panfpn_fast import ops
from panfpn_fast.models.boxes import Size, clip_boxes, nonempty, scale_boxes
from panfpn_fast.models.config import FPN_STRIDES
from panfpn_fast.models.layers import at_least_float32
from panfpn_fast.models.outputs import InstanceOutput, PanopticOutput
from panfpn_fast.models.panoptic_fpn import PanopticFPN, merge_settings
from panfpn_fast.ops import PanopticSegments
from panfpn_fast.ops._checks import int_pair

SEGMENT = "segment_"
"""Prefix of the names of the segment table's columns."""

RunBoth = Callable[[Callable[[], Any], Callable[[], Any]], tuple[Any, Any]]
"""Runs two functions that do not depend on each other, and returns both results."""


def _in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    return first(), second()


class PaddedPanopticFPN(nn.Module):
    """Predicts as a `PanopticFPN` does, with tensor shapes that depend only on the shape of the images.

    The network and its weights are shared, not copied.

    Args:
        model: A network in evaluation mode.
        output_size: Height and width of the results; None for the size of the images.
        max_candidates: Largest number of (proposal, class) pairs per image that enter NMS; the best are selected.
            Usually some hundred pairs have a probability above `score_threshold`. `overflow` reports whether more
            candidates could have changed the result.

    Raises:
        TypeError: If `model` is not a `PanopticFPN`.
        ValueError: If `model` is in training mode, or another argument has an invalid value.

    Note:
        There is no host sync and no data-dependent shape. A call can be captured in a CUDA graph, and
        `torch.compile(..., fullgraph=True)` and `torch.export.export` handle the whole module. Before a capture, call
        the module once with images of the same shape: the first call compiles kernels and loads them to the GPU, which
        CUDA does not allow during a capture.

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
        """Predicts a batch of images.

        Args:
            images: RGB images [N, 3, H, W] of one size, already resized for the network, with values from 0 to 255,
                uint8 or floating, on the network's device.

        Returns:
            With D = `detections_per_image` (0 for a network without the instance branch) and S = D + `num_stuff`:

            - `panoptic`: int32 [N, height, width], the segment id of each pixel; 0 is void.
            - `segment_id`, `segment_isthing`, `segment_label`, `segment_score`, `segment_area`,
              `segment_instance`: [N, S], the columns of the segment table, see `ops.panoptic_merge_padded`.
            - `segment_count`: int64 [N], the number of segments in the table.
            - `boxes` [N, D, 4], `scores` [N, D], `classes` int64 [N, D], `mask_probs` [N, D, 28, 28]:
              detections by descending score, then zeros; see `PanopticOutput`.
            - `count`: int64 [N], the number of detections.
            - `semantic`: [N, height, width], 0 is "other" (all things), stuff starts at 1.
            - `overflow`: bool [N], whether there were more than `max_candidates` candidates and
              `PanopticFPN` might detect different instances.

        Raises:
            TypeError: If `images` is not a tensor of uint8 or a floating dtype.
            ValueError: If `images` has the wrong shape or no pixels.
        """
        _check_images(images)
        size = (images.shape[2], images.shape[3])
        output_size = self.output_size or size
        return self.merge(*self.branches(images, size, output_size), size, output_size)

    @torch.no_grad()
    def branches(
        self,
        images: Tensor,
        size: Size,
        output_size: Size,
        anchors: Sequence[Tensor] | None = None,
        run_both: RunBoth = _in_turn,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Computes the part of `forward` before the maps, whose shapes do not depend on the output size.

        With sizes in tensors, it can be captured in a CUDA graph that serves all images of one padded shape.

        Args:
            images: RGB images as in `forward`. If `size` is a tensor, they are padded to a multiple of
                `config.size_divisibility`, with any values.
            size: Height and width of all images, or an int64 tensor [N, 2] with those of each image without padding.
            output_size: Height and width of the results, or an int64 tensor [N, 2] if `size` is a tensor.
            anchors: The anchors of each level, see `anchors`; None to compute them.
            run_both: Runs two functions, the semantic and the instance branch, and returns both results. A GPU can run
                them at the same time.

        Returns:
            The outputs of `forward` from `boxes` to `count` and `overflow`, and the logits of the semantic branch, None
            without it.
        """
        batch = self._prepare(images, size)
        features = self.model.features(batch)
        logits, found = run_both(
            lambda: self.model.semantic_logits(features),
            lambda: self._instances(features, batch, size, output_size, anchors),
        )
        return found, logits

    def anchors(self, height: int, width: int) -> list[Tensor]:
        """Returns the anchors [M, 4] of each level for images of a padded size; empty without the instance branch."""
        if "instance" not in self.model.config.tasks:
            return []
        shapes = [(-(-height // stride), -(-width // stride)) for stride in FPN_STRIDES]
        return self.model.rpn.anchors([torch.empty(shape, device="meta") for shape in shapes])

    @torch.no_grad()
    def merge(
        self,
        found: Mapping[str, Tensor],
        logits: Tensor | None,
        size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Labels the pixels and merges both branches.

        Args:
            found: The first result of `branches`.
            logits: The second one.
            size: Height and width of all images without padding.
            output_size: Height and width of the results.

        Returns:
            The outputs of `forward`.
        """
        images = len(found["count"])
        semantic = torch.stack(self.model.label(logits, [size] * images, [output_size] * images))
        merged = [self._merge(found, semantic, i) for i in range(images)]
        tables = {name: torch.stack([one[name] for one in merged]) for name in merged[0]}
        return {**tables, **found, "semantic": semantic}

    def _prepare(self, images: Tensor, size: Size) -> Tensor:
        """Normalises images and sets their padding to zero."""
        x = self.model.normalize(images).to(self.model.dtype)
        if not isinstance(size, Tensor):
            bottom, right = (-side % self.model.config.size_divisibility for side in size)
            return F.pad(x, (0, right, 0, bottom))
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        outside = (rows >= size[:, :1])[:, None, :, None] | (columns >= size[:, 1:])[:, None, None]
        return x.masked_fill(outside, 0).contiguous(memory_format=self.model.memory_format)

    def _instances(
        self,
        features: Mapping[str, Sequence[Tensor]],
        batch: Tensor,
        size: Size,
        output_size: Size,
        anchors: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        """Runs the instance branch; returns its outputs at the output size."""
        model = self.model
        if "instance" not in model.config.tasks:
            return _no_instances(batch, 2 * model.config.mask_pool_size)
        pyramid = features["instance"]
        sizes = size if isinstance(size, Tensor) else [size] * len(batch)
        # The boxes of an image are along the second axis.
        size, output_size = (
            side[:, None] if isinstance(side, Tensor) else side for side in (size, output_size)
        )
        objectness, moves = model.rpn(pyramid)
        anchors = model.rpn.anchors(pyramid) if anchors is None else anchors
        proposals, proposed = model.rpn.propose_padded(anchors, objectness, moves, sizes)
        class_logits, deltas = model.box_head(pyramid, list(proposals.unbind()))
        found = model.box_head.detect_padded(
            class_logits, deltas, proposals, proposed, size, self.max_candidates
        )
        boxes = clip_boxes(scale_boxes(found.boxes, size, output_size), output_size)
        # Boxes without area at the output size are removed, and later boxes move up.
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
        """Merges one image; returns its panoptic map and segment table."""
        config = self.model.config
        scores = found["scores"][image]
        rows = torch.arange(len(scores), device=scores.device)
        panoptic, segments, count = ops.panoptic_merge_padded(
            found["mask_probs"][image],
            found["boxes"][image],
            # Padding gets a score below any threshold.
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
    """Converts the output of a `PaddedPanopticFPN` to the output of a `PanopticFPN` by removing the padding.

    Args:
        outputs: The output of the module, or of a program exported from it.

    Returns:
        One `PanopticOutput` per image, whose tensors are views.

    Note:
        One host sync, for the two counts.
    """
    counts = torch.stack((outputs[f"{SEGMENT}count"], outputs["count"]), dim=1).tolist()
    return [
        PanopticOutput(
            outputs["panoptic"][i],
            PanopticSegments(*(outputs[f"{SEGMENT}{name}"][i, :rows] for name in PanopticSegments._fields)),
            **{name: outputs[name][i, :count] for name in InstanceOutput._fields},
            semantic=outputs["semantic"][i],
        )
        for i, (rows, count) in enumerate(counts)
    ]


def _masked(values: Tensor, keep: Tensor) -> Tensor:
    """Zeros where `keep` [N, D] is not set in `values` [N, D, ...]."""
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
