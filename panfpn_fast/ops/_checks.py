"""Argument checks that several ops share. Each message names the argument, the accepted values and the given value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_SAMPLING_RATIO = 1024
_MAX_SCALE_FACTOR = 2**16
_MAX_SIDE = 2**31 - 1  # height or width of an output or an image
INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str, value: Any, dtypes: Sequence[torch.dtype], shape: str, dims: Sequence[int]
) -> None:
    """Checks that a value is a tensor with an accepted dtype and number of dimensions.

    `shape` describes the accepted shapes in the message.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected dtype {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}"
        )
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_feature_map(name: str, value: Any) -> None:
    """Checks a feature map [N, C, H, W]."""
    check_tensor(name, value, FLOATING, "[N, C, H, W]", (4,))
    check_gpu_precision(name, value)


def check_gpu_precision(name: str, value: Tensor) -> None:
    """Rejects float64 on a GPU: it is slow on most GPUs, and the ops accept it only for checks on the CPU."""
    if value.dtype == torch.float64 and value.device.type == "cuda":
        raise TypeError(f"{name}: expected float32, float16 or bfloat16 on a GPU, got float64")


def check_boxes(name: str, boxes: Any, rows: int | None = None) -> None:
    """Checks a [N, 4] tensor of boxes."""
    check_tensor(name, boxes, FLOATING, "[N, 4]", (2,))
    if boxes.shape[1] != 4 or (rows is not None and boxes.shape[0] != rows):
        raise ValueError(
            f"{name}: expected shape [{'N' if rows is None else rows}, 4], got {list(boxes.shape)}"
        )


def check_rows(name: str, value: Tensor, rows: int, counted: str) -> None:
    """Checks that a 1-D tensor has `rows` values; `counted` names the objects that they belong to."""
    if value.shape[0] != rows:
        raise ValueError(
            f"{name}: expected shape [{rows}], one value for each of {counted}, got {list(value.shape)}"
        )


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    """Checks that a tensor is on the device of another argument."""
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, the device of {other}, got {value.device}")


def check_number(name: str, value: Any) -> None:
    """Checks that a value is a number other than NaN."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a Python number, got {type(value).__name__}")
    if value != value:  # NaN; math.isnan would stop torch.compile
        raise ValueError(f"{name}: expected a number, got nan")


def check_positive(name: str, value: Any) -> None:
    """Checks that a value is a finite number above zero."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_int(name: str, value: Any, maximum: int = 2**62) -> None:
    """Checks that a value is an integer whose magnitude is at most `maximum`."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a Python int, got {type(value).__name__}")
    if not -maximum <= value <= maximum:
        raise ValueError(f"{name}: expected an integer with a magnitude of at most {maximum}, got {value}")


def check_scale_factor(value: Any) -> None:
    """Checks an upsampling factor."""
    check_int("scale_factor", value)
    if not 1 <= value <= _MAX_SCALE_FACTOR:
        raise ValueError(f"scale_factor: expected an integer from 1 to {_MAX_SCALE_FACTOR}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_sampling_ratio(value: Any) -> None:
    """Checks the number of samples per bin. Each one costs time, so a mistyped large number would look like a hang."""
    check_int("sampling_ratio", value)
    if value > _MAX_SAMPLING_RATIO:
        raise ValueError(f"sampling_ratio: expected at most {_MAX_SAMPLING_RATIO}, got {value}")


def int_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Returns (height, width) from this pair or from one integer for both; each must be at least `minimum`."""
    pair: Any = (value, value) if isinstance(value, (int, torch.SymInt)) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str):
        raise TypeError(f"{name}: expected a Python int or (height, width), got {type(value).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{name}: expected (height, width), got {len(pair)} values")
    for side in pair:
        check_int(name, side, _MAX_SIDE)
        if side < minimum:
            raise ValueError(f"{name}: expected integers of at least {minimum}, got {tuple(pair)}")
    height, width = pair
    return height, width


def image_size_pair(image_size: Any) -> tuple[int, int]:
    """Checks the size of an image and returns (height, width)."""
    if not isinstance(image_size, Sequence):
        raise TypeError(f"image_size: expected (height, width), got {type(image_size).__name__}")
    return int_pair("image_size", image_size, 0)


def full_precision(value: Tensor) -> Tensor:
    """Converts float16 and bfloat16 to float32: half precision is too coarse for positions; the tensors are small."""
    return value if value.dtype == torch.float64 else value.to(torch.float32)


def check_masks(masks: Any) -> Tensor:
    """Checks masks and returns them as [N, M_h, M_w]."""
    check_tensor("masks", masks, (*FLOATING, torch.bool), "[N, M, M] or [N, 1, M, M]", (3, 4))
    check_gpu_precision("masks", masks)
    if masks.dim() == 4:
        if masks.shape[1] != 1:
            raise ValueError(f"masks: expected shape [N, M, M] or [N, 1, M, M], got {list(masks.shape)}")
        return masks[:, 0]
    return masks


def batched_boxes(boxes: Any, batch: int, like: Tensor) -> Tensor:
    """Checks boxes, [K, 5] or one [L, 4] per image, and returns them as [K, 5].

    Coordinates are float64 if `like` is float64, else float32.
    """
    if isinstance(boxes, Tensor):
        check_tensor("boxes", boxes, FLOATING, "[K, 5] or a list of [L, 4]", (2,))
        if boxes.shape[1] != 5:
            raise ValueError(f"boxes: expected shape [K, 5] or a list of [L, 4], got {list(boxes.shape)}")
        check_device("boxes", boxes, like.device, "the feature maps")
        rois = boxes
    elif isinstance(boxes, (list, tuple)):
        if len(boxes) != batch:
            raise ValueError(
                f"boxes: expected one tensor for each of {batch} images, got {len(boxes)} tensors"
            )
        parts = []
        for i, of_image in enumerate(boxes):
            check_boxes(f"boxes[{i}]", of_image)
            check_device(f"boxes[{i}]", of_image, like.device, "the feature maps")
            of_image = full_precision(of_image)
            parts.append(torch.cat([of_image.new_full((of_image.shape[0], 1), i), of_image], dim=1))
        rois = torch.cat(parts) if parts else like.new_zeros((0, 5), dtype=torch.float32)
    else:
        raise TypeError(f"boxes: expected a tensor [K, 5] or a list of [L, 4], got {type(boxes).__name__}")
    return rois.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
