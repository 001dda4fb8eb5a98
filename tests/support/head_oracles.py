"""The inference steps of the heads, computed one box at a time with Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]


def decode(box: Sequence[float], delta: Sequence[float], weights: Sequence[float]) -> Box:
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
    limit = math.log(1000 / 16)
    w, h = w * math.exp(min(dw, limit)), h * math.exp(min(dh, limit))
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def clip(box: Box, height: int, width: int) -> Box:
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0), width),
        min(max(y1, 0), height),
        min(max(x2, 0), width),
        min(max(y2, 0), height),
    )


def area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def iou(a: Box, b: Box) -> float:
    inter = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return inter / (area(a) + area(b) - inter)


def nms(candidates: list[tuple[float, Box, int]], threshold: float) -> list[tuple[float, Box, int]]:
    """Applies NMS within groups to candidates (score, box, group); returns the kept ones by descending score."""
    kept: list[tuple[float, Box, int]] = []
    for score, box, group in sorted(candidates, key=lambda c: -c[0]):
        if all(group != g or iou(box, b) <= threshold for _, b, g in kept):
            kept.append((score, box, group))
    return kept
