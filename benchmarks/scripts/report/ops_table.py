"""The table of ops in README.md, derived from `panfpn_fast.ops`."""

from __future__ import annotations

import inspect

from panfpn_fast import ops

from .tables import replace_between, table

# The functions that an op replaces, where there are any.
REPLACED = {
    "batched_nms": "`torchvision.ops.batched_nms`",
    "conv3x3": "`relu(conv2d(x, weight, bias, padding=1) + residual)`",
    "conv_gn_relu_project": "the last stage of a semantic head and its predictor",
    "conv_gn_relu_upsample": "a stage of a semantic head",
    "group_norm_relu_upsample": "`interpolate(relu(group_norm(x)))`, plus an addition",
    "multiscale_roi_align": "detectron2's `ROIPooler`",
    "nms": "`torchvision.ops.nms`",
    "nms_padded": "`torchvision.ops.nms` and `batched_nms`, in a CUDA graph",
    "panoptic_merge": "detectron2's `combine_semantic_and_instance_outputs`, mmdetection's and panopticapi's mergers",
    "panoptic_merge_padded": "the same mergers, in a CUDA graph",
    "paste_masks": "detectron2's `paste_masks_in_image`",
    "paste_masks_rle": "`paste_masks_in_image` followed by `pycocotools.mask.encode`",
    "roi_align": "`torchvision.ops.roi_align`",
    "upsample_argmax": "`interpolate(...).argmax(1)`, also two interpolations with a crop in between",
    "upsample_cross_entropy": "`F.cross_entropy(F.interpolate(...), target)`",
}


def op_names() -> list[str]:
    """Returns the functions in `ops.__all__`."""
    return [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]


def summary(name: str) -> str:
    """Returns the first line of the docstring of an op, without the full stop."""
    docstring = inspect.getdoc(getattr(ops, name)) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def readme_with_ops(text: str) -> str:
    """Rewrites the table of ops between its markers in the text of README.md.

    The third column is the first line of each docstring.
    """
    lines = [(f"`{name}`", REPLACED.get(name, ""), summary(name)) for name in op_names()]
    return replace_between(text, "ops", lambda _: table(("op", "replaces", "computes"), lines, left=3))
