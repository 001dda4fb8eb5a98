"""The ops of this package in standard operators of ONNX, for the networks of this package.

Importing this module needs onnxscript. torch's exporter calls the functions with values of the graph in place of
tensors, and each call of an operator adds a node to the graph. The arguments are those of the schemas in
csrc/library.cpp. The height and the width of images may vary; all other sizes are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import BOOL, FLOAT, INT32, INT64, script
from onnxscript import opset18 as op

OPSET = 18
"""Version of the operators. 16 brought half-pixel RoiAlign, 18 the sums of ScatterElements that are used here."""

Value = Any
"""A value of the graph (`onnx_ir.Value`), or a list or number that becomes a constant of it."""

_LOWEST = float(np.finfo(np.float32).min)


def translations(groups: int, resampled: bool) -> dict[Any, Callable[..., Any]]:
    """Returns the translation of each op, for `torch.onnx.export(custom_translation_table=...)`.

    Args:
        groups: Number of groups of `nms_padded`: the values of `idxs` are below it.
        resampled: Whether results have another size than images.
    """

    def upsample_argmax(
        logits: FLOAT,
        scale_factor: int,
        crop_height: INT64,
        crop_width: INT64,
        height: INT64,
        width: INT64,
        return_prob: bool,
    ) -> tuple[INT64, FLOAT]:
        size = (height, width) if resampled else None
        return _upsample_argmax(logits, scale_factor, (crop_height, crop_width), size)

    def nms_padded(
        boxes: FLOAT, scores: FLOAT, idxs: INT64, iou_threshold: float, max_output: int
    ) -> tuple[INT64, INT64]:
        return _nms_padded(boxes, scores, idxs, iou_threshold, max_output, groups)

    ours, aten = torch.ops.panfpn_fast, torch.ops.aten
    return {
        ours.conv3x3_statistics.default: _conv3x3_statistics,
        ours.group_norm_relu_upsample.default: _group_norm_relu_upsample,
        ours.group_norm_relu_project.default: _group_norm_relu_project,
        ours.upsample_argmax.default: upsample_argmax,
        ours.multiscale_roi_align.default: _multiscale_roi_align,
        ours.nms_padded.default: nms_padded,
        ours.panoptic_merge_padded.default: _panoptic_merge_padded,
        aten.sort.stable: _sort,
        aten.topk.default: _topk,
    }


def _constant(values: Any, dtype: type[np.generic]) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(values, dtype)))


def _vector(numbers: Sequence[Value]) -> Value:
    """Joins numbers, each of shape [] or [1]."""
    return op.Concat(*(op.Reshape(number, [1]) for number in numbers), axis=0)


def _resize(x: Value, *, scale_factor: int) -> Value:
    scales = _constant([1, 1, scale_factor, scale_factor], np.float32)
    return op.Resize(x, None, scales, mode="linear", coordinate_transformation_mode="half_pixel")


def _resize_to(x: Value, size: Value) -> Value:
    sizes = op.Concat(op.Slice(op.Shape(x), [0], [2]), size, axis=0)
    return op.Resize(x, None, None, sizes, mode="linear", coordinate_transformation_mode="half_pixel")


def _conv3x3_statistics(
    input: FLOAT, weight: FLOAT, num_groups: int, eps: float
) -> tuple[FLOAT, FLOAT, FLOAT]:
    y = op.Conv(input, weight, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    grouped = op.Reshape(y, [0, num_groups, -1])
    mean = op.ReduceMean(grouped, [2], keepdims=1)
    centred = op.Sub(grouped, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), [2], keepdims=1)
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, _constant(eps, np.float32))))
    return y, op.Squeeze(mean, [2]), op.Squeeze(rstd, [2])


def _group_norm_relu(input: Value, mean: Value, rstd: Value, weight: Value, bias: Value) -> Value:
    """Normalises with statistics [N, G] and applies ReLU; scale and shift of each channel are computed first."""
    groups, channels = mean.shape[1], weight.shape[0]
    scale = op.Mul(op.Reshape(weight, [1, groups, -1]), op.Unsqueeze(rstd, [2]))  # [N, G, C / G]
    shift = op.Sub(op.Reshape(bias, [1, groups, -1]), op.Mul(op.Unsqueeze(mean, [2]), scale))
    scale, shift = (op.Reshape(factor, [-1, channels, 1, 1]) for factor in (scale, shift))
    return op.Relu(op.Add(op.Mul(input, scale), shift))


def _group_norm_relu_upsample(
    input: FLOAT,
    mean: FLOAT,
    rstd: FLOAT,
    weight: FLOAT,
    bias: FLOAT,
    scale_factor: int,
    residual: FLOAT | None = None,
) -> FLOAT:
    y = _resize(_group_norm_relu(input, mean, rstd, weight, bias), scale_factor=scale_factor)
    return y if residual is None else op.Add(y, residual)


def _group_norm_relu_project(
    input: FLOAT,
    mean: FLOAT,
    rstd: FLOAT,
    weight: FLOAT,
    bias: FLOAT,
    proj_weight: FLOAT,
    proj_bias: FLOAT | None = None,
    residual: FLOAT | None = None,
) -> FLOAT:
    y = _group_norm_relu(input, mean, rstd, weight, bias)
    logits = op.Conv(y, op.Unsqueeze(proj_weight, [2, 3]), proj_bias, kernel_shape=[1, 1])
    if residual is None:
        return logits
    # The residual has the size of the input or half of it.
    return op.Add(logits, _resize_to(residual, op.Slice(op.Shape(input), [2], [4])))


def _upsample_argmax(
    logits: Value, scale_factor: int, crop: Sequence[Value], size: Sequence[Value] | None
) -> tuple[Value, Value]:
    """Labels pixels; `size` is None if there is no second resampling. The network never asks for the probabilities."""
    resized = op.Slice(_resize(logits, scale_factor=scale_factor), [0, 0], _vector(crop), [2, 3])
    if size is not None:
        resized = _resize_to(resized, _vector(size))
    labels = op.ArgMax(resized, axis=1, keepdims=0)
    dtype = ir.DataType.UINT8 if logits.shape[1] <= 256 else ir.DataType.INT16
    return op.Cast(labels, to=dtype), op.ConstantOfShape([0])


def _multiscale_roi_align(
    features: Sequence[FLOAT],
    boxes: FLOAT,
    spatial_scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_box_size: float,
    canonical_level: int,
    level_epsilon: float,
) -> FLOAT:
    """Pools all boxes on every level, since shapes are fixed, and takes each from its own.

    On the other levels a box is replaced by one of a single sample per bin, so that they cost little.
    """
    images = op.Cast(op.Reshape(op.Slice(boxes, [0], [1], [1]), [-1]), to=ir.DataType.INT64)
    boxes = op.Slice(boxes, [1], [5], [1])
    sides = op.Sub(op.Slice(boxes, [2], [4], [1]), op.Slice(boxes, [0], [2], [1]))
    width, height = op.Slice(sides, [0], [1], [1]), op.Slice(sides, [1], [2], [1])  # [K, 1]
    zero = _constant(0, np.float32)
    nonempty = op.And(op.Greater(width, zero), op.Greater(height, zero))
    size = op.Div(op.Sqrt(op.Mul(width, height)), _constant(canonical_box_size, np.float32))
    size = op.Add(size, _constant(level_epsilon, np.float32))
    finest = round(-np.log2(spatial_scales[0]))
    pooled: Value = None
    for i, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        # The level is floor(canonical_level + log2(size)), limited to the levels that there are.
        member = nonempty
        if i > 0:
            least = 2.0 ** (finest + i - canonical_level)
            member = op.And(member, op.GreaterOrEqual(size, _constant(least, np.float32)))
        if i + 1 < len(spatial_scales):
            limit = 2.0 ** (finest + i + 1 - canonical_level)
            member = op.And(member, op.Less(size, _constant(limit, np.float32)))
        found = op.RoiAlign(
            feature,
            op.Where(member, boxes, _constant([[0, 0, 1, 1]], np.float32)),
            images,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            mode="avg",
            output_height=pooled_height,
            output_width=pooled_width,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale,
        )
        pooled = op.Where(op.Unsqueeze(member, [2, 3]), found, zero if pooled is None else pooled)
    return pooled


def _nms_padded(
    boxes: Value, scores: Value, idxs: Value, iou_threshold: float, max_output: int, groups: int
) -> tuple[Value, Value]:
    """Keeps boxes [B, N, 4]. Boxes with a score of -inf, which the op keeps behind all others, are left out."""
    lowest, nothing = _constant([_LOWEST], np.float32), _constant(-np.inf, np.float32)
    # Each box takes part in the NMS of its own group alone, [B, groups, N].
    member = op.Equal(op.Unsqueeze(idxs, [1]), _constant(np.arange(groups)[:, None], np.int64))
    per_group = op.Where(member, op.Unsqueeze(scores, [1]), nothing)
    selected = op.NonMaxSuppression(
        boxes, per_group, [max_output], _constant([iou_threshold], np.float32), lowest
    )  # [K, 3]: image, group, box
    places = op.Gather(selected, [0, 2], axis=1)
    ones = op.Expand(_constant(1, np.float32), op.Slice(op.Shape(selected), [0], [1]))
    kept = op.ScatterND(op.ConstantOfShape(op.Shape(scores)), places, ones)
    ranked = op.Where(op.Greater(kept, _constant(0.5, np.float32)), scores, nothing)
    # There may be fewer boxes than `max_output`.
    ranked = op.Pad(ranked, [0, 0, 0, max_output], nothing)
    best, index = op.TopK(ranked, [max_output], axis=1, largest=1, sorted=1)
    found = op.Greater(best, lowest)
    keep = op.Where(found, index, _constant(-1, np.int64))
    return keep, op.ReduceSum(op.Cast(found, to=ir.DataType.INT64), [1], keepdims=0)


def _sort(self: BOOL, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Sorts bools [B, N], which TopK does not take. The index makes keys differ: OpenVINO's TopK is not stable."""
    if self.dtype != ir.DataType.BOOL or dim not in (1, -1) or descending:
        raise NotImplementedError("only bools [B, N] are sorted, in each row, ascending")
    count = self.shape[1]
    keys = op.Where(self, _constant(count, np.int64), _constant(0, np.int64))
    keys = op.Add(keys, _constant(np.arange(count)[None], np.int64))
    _, indices = op.TopK(keys, [count], axis=1, largest=0, sorted=1)
    return op.GatherElements(self, indices, axis=1), indices


def _topk(
    self: FLOAT, k: INT64, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[FLOAT, INT64]:
    """Always sorts, which TensorRT's TopK must."""
    values, indices = op.TopK(self, op.Reshape(k, [1]), axis=dim, largest=int(largest), sorted=1)
    return values, indices


def _paste_weights(start: Value, end: Value, pixels: Value, size: int) -> Value:
    """Returns the weights [N, pixels, size] of a mask's values along an axis, for boxes from `start` to `end` [N, 1].

    They are those of bilinear sampling with zeros around the mask: 1 at the center of a value and 0 one value further.
    """
    one, two = _constant(1, np.float32), _constant(2, np.float32)
    places = op.Range(_constant(0, np.float32), op.Cast(pixels, to=ir.DataType.FLOAT), one)
    centres = op.Sub(op.Add(places, _constant(0.5, np.float32)), start)
    normalised = op.Sub(op.Mul(op.Div(centres, op.Sub(end, start)), two), one)
    positions = op.Mul(op.Add(normalised, one), _constant(size, np.float32))
    positions = op.Div(op.Sub(positions, one), two)  # [N, pixels]
    distances = op.Abs(op.Sub(op.Unsqueeze(positions, [2]), _constant(np.arange(size), np.float32)))
    return op.Relu(op.Sub(one, distances))


@script(default_opset=op)
def _place_instances(
    number: INT64,
    rows: FLOAT[...],
    masks: FLOAT[...],
    columns: FLOAT[...],
    no_areas: INT32[...],
    no_pixels: INT32[...],
    mask_threshold: FLOAT,
    overlap_threshold: FLOAT,
    epsilon: FLOAT,
) -> tuple[INT32[...], INT32[...]]:
    """Places the first `number` instances in a map of zeros.

    Returns:
        The map [H, W], and the area of each instance in it, [N], 0 for those that are not placed.
    """
    # No name may be that of an output of the network: torch's exporter does not rename the values of a function.
    zero = op.Constant(value_int=0)
    nothing = op.Cast(zero, to=6)
    ids = op.Identity(no_pixels)
    areas = op.Identity(no_areas)
    last = op.Identity(nothing)
    length = op.Shape(no_areas)
    instances = op.Range(zero, op.Squeeze(length), op.Constant(value_int=1))
    for i in range(number):
        mask = op.Gather(masks, i, axis=0)
        values = op.MatMul(op.MatMul(op.Gather(rows, i, axis=0), mask), op.Gather(columns, i, axis=0))
        inside = op.GreaterOrEqual(values, mask_threshold)
        free = op.And(inside, op.Equal(ids, nothing))
        area = op.ReduceSum(op.Cast(inside, to=6), keepdims=0)
        free_area = op.ReduceSum(op.Cast(free, to=6), keepdims=0)
        taken = op.Cast(op.Sub(area, free_area), to=1)
        share = op.Div(taken, op.Add(op.Cast(area, to=1), epsilon))
        placed = op.And(op.Greater(free_area, nothing), op.Not(op.Greater(share, overlap_threshold)))
        last = op.Add(last, op.Cast(placed, to=6))
        ids = op.Where(op.And(free, placed), last, ids)
        areas = op.Where(op.And(op.Equal(instances, i), placed), free_area, areas)
    return ids, areas


def _panoptic_merge_padded(
    masks: FLOAT,
    boxes: FLOAT,
    scores: FLOAT,
    classes: INT64,
    semantic: INT64,
    score_threshold: float,
    overlap_threshold: float,
    stuff_area_threshold: int,
    mask_threshold: float,
    rule: str,
    max_segments: int,
) -> tuple[INT32, INT64, INT64]:
    """Merges as in `PaddedPanopticFPN`: scores descend and are not NaN, and each stuff label has a row of the table.

    The rules then differ in the share of an instance that is taken. It is a quotient of float32, which is exact to
    1e-7, also for the rules that compute it in float64.
    """
    instances, size = masks.shape[0], masks.shape[1]
    stuff = max_segments - instances
    shape = op.Shape(semantic)
    height, width = (op.Gather(shape, axis) for axis in (0, 1))
    panoptic = op.Expand(_constant(0, np.int32), shape)
    areas = _constant(np.zeros(instances), np.int32)
    if instances:
        # The least float32 that reaches the threshold, which is compared in float64.
        least = np.float32(score_threshold)
        if float(least) < score_threshold:
            least = np.nextafter(least, np.float32(np.inf))
        enough = op.GreaterOrEqual(scores, _constant(least, np.float32))
        x1, y1, x2, y2 = (op.Slice(boxes, [i], [i + 1], [1]) for i in range(4))
        panoptic, areas = _place_instances(
            op.ReduceSum(op.Cast(enough, to=ir.DataType.INT64), keepdims=0),
            _paste_weights(y1, y2, height, size),
            masks,
            op.Transpose(_paste_weights(x1, x2, width, masks.shape[2]), perm=[0, 2, 1]),
            areas,
            panoptic,
            _constant(mask_threshold, np.float32),
            _constant(overlap_threshold, np.float32),
            _constant(1e-5 if rule == "mmdetection" else 0, np.float32),
        )
    zero = _constant(0, np.int32)
    free = op.Equal(panoptic, zero)
    labels = op.Cast(semantic, to=ir.DataType.INT64)
    counted = op.Reshape(op.Where(free, labels, _constant(0, np.int64)), [-1])
    counts = op.ScatterElements(
        _constant(np.zeros(stuff + 1), np.int32),
        counted,
        op.Expand(_constant(1, np.int32), op.Shape(counted)),
        axis=0,
        reduction="add",
    )
    counts = op.Slice(counts, [1], [stuff + 1])
    enough = op.GreaterOrEqual(counts, _constant(max(stuff_area_threshold, 1), np.int32))
    areas = op.Concat(areas, op.Where(enough, counts, zero), axis=0)  # [max_segments]
    placed = op.Greater(areas, zero)
    # In float32, which TensorRT's CumSum takes.
    running = op.CumSum(op.Cast(placed, to=ir.DataType.FLOAT), _constant(0, np.int64))
    ids = op.Where(placed, op.Cast(running, to=ir.DataType.INT32), zero)
    of_labels = op.Concat(_constant([0], np.int32), op.Slice(ids, [instances], [max_segments]), axis=0)
    panoptic = op.Where(free, op.Gather(of_labels, labels), panoptic)
    return panoptic, *_table(ids, placed, areas, classes, instances, stuff)


def _table(
    ids: Value, placed: Value, areas: Value, classes: Value, instances: int, stuff: int
) -> tuple[Value, Value]:
    """Makes the segment table of the rows that are placed, and their number."""
    rows = instances + stuff
    things = np.arange(rows) < instances
    columns = [
        op.Cast(ids, to=ir.DataType.INT64),
        _constant(things, np.int64),
        op.Concat(classes, _constant(np.arange(stuff) + 1, np.int64), axis=0),
        op.Cast(areas, to=ir.DataType.INT64),
        _constant(np.where(things, np.arange(rows), -1), np.int64),
    ]
    table = op.Concat(*(op.Unsqueeze(column, [1]) for column in columns), axis=1)
    weights = op.Where(placed, _constant(2 * rows, np.float32), _constant(0, np.float32))
    order = op.TopK(op.Sub(weights, _constant(np.arange(rows), np.float32)), [rows])[1]  # placed rows first
    table = op.Where(
        op.Unsqueeze(op.Gather(placed, order), [1]),
        op.Gather(table, order, axis=0),
        _constant([[0, 0, -1, 0, -1]], np.int64),
    )
    return table, op.ReduceSum(op.Cast(placed, to=ir.DataType.INT64), keepdims=0)
