"""Helpers that the replacements for several frameworks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# A framework's own function, or the replacement for it.
Function = Callable[..., Any]

# `ops.panoptic_merge` treats labels from this number on as void.
MAX_LABELS = 4096

# Ops raise these exceptions for calls that they do not support, before they compute anything. ImportError is
# included for every framework: ops that run in Triton raise it on a GPU without Triton, where the framework's own
# function still works.
REFUSED = (TypeError, ValueError, ImportError)


def served(serve: Function) -> Callable[[Function], Function]:
    """Decorator that makes `serve` a factory of replacements, as `Replacement.make` expects it.

    The replacement passes each call to `serve`, which computes the result with an op of this library. It calls the
    framework's own function with the same arguments if `serve` returns None or raises one of `REFUSED`. So a call that
    worked without the patch works with it, and the framework raises its own errors. A call that the framework refuses
    may work with the patch.

    Args:
        serve: Takes the arguments of the framework's function. Returns the result, or None for a call that the op
            does not support. Must not modify its arguments before the last step that can fail.

    Returns:
        A function that takes the framework's own function and returns its replacement.
    """
    try_to = attempt

    def make(original: Function) -> Function:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            result = try_to(serve, *args, **kwargs)
            return original(*args, **kwargs) if result is None else result

        if not isinstance(original, FunctionType):
            return replacement
        # torch.jit.script compiles the source of a patched method's original, and looks its names up in the globals of
        # the replacement. So these are the original's; the replacement itself uses none.
        code, closure = replacement.__code__, replacement.__closure__
        return FunctionType(code, original.__globals__, original.__name__, None, closure)

    return make


def attempt(function: Function, *args: Any, **kwargs: Any) -> Any:
    """Calls a function that uses an op; returns its result, or None if the op does not support the call."""
    try:
        return function(*args, **kwargs)
    except REFUSED:
        return None


def is_framework_class(value: Any, package: str, name: str) -> bool:
    """Whether an object's class is exactly the framework's class of this name; a subclass may override behaviour."""
    return type(value).__name__ == name and type(value).__module__.split(".")[0] == package


def drop_negative_areas(rois: Tensor) -> Tensor:
    """Replaces RoIs of negative area by NaN, which `ops.multiscale_roi_align` pools to zeros.

    Both frameworks take the square root of the area, get NaN, assign the RoI to no level and return zeros for it.

    Args:
        rois: [N, 5], rows of (image index, x1, y1, x2, y2).
    """
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    return rois.masked_fill((area < 0)[:, None], math.nan)


def pasting_agrees(masks: Tensor, threshold: float) -> bool:
    """Whether `ops.paste_masks` sets the same pixels as both frameworks do.

    On the CPU the frameworks compute only a window around each box. Outside this window a large mask has values below
    0.5, so the results differ for lower thresholds. They also differ for negative ones, which request probabilities.
    """
    return masks.is_cuda or threshold >= 0.5


def score_order(scores: Tensor) -> Tensor:
    """Returns the order in which both frameworks merge instances; their sort is not stable for equal scores."""
    return torch.argsort(-scores)


def integer_threshold(threshold: float) -> int:
    """Rounds an area threshold up: an integer area is below the result exactly if it is below `threshold`.

    Raises:
        ValueError: If `threshold` is not finite.
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite number, got {threshold}")
    return math.ceil(threshold)
