"""Seeded scenes for training and tests without a download: textured grounds and overlapping shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from panfpn_fast.data.categories import get_categories
from panfpn_fast.data.sample import Sample

Map = npt.NDArray[np.float32]

SYNTHETIC = get_categories("synthetic")

HELD_OUT_SEED = 1_000_000
"""Offset of the seed of evaluation scenes from the seed of the run."""

# A shape becomes void if fewer pixels than this, or a smaller share of its area, are visible.
_LEAST_VISIBLE_PIXELS = 30
_LEAST_VISIBLE_SHARE = 0.15


def _smooth_noise(shape: tuple[int, int], cell: int, random: np.random.Generator) -> Map:
    """Returns noise in 0..1 with blobs of about `cell` pixels."""
    height, width = shape
    coarse = random.random((height // cell + 2, width // cell + 2), dtype=np.float32)
    y, x = np.arange(height, dtype=np.float32) / cell, np.arange(width, dtype=np.float32) / cell
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None], (x - left)[None]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down


def _sky(y: Map, x: Map, random: np.random.Generator) -> Map:
    return 0.75 + 0.25 * _smooth_noise(y.shape, 24, random) - 0.1 * y / y.shape[0]


def _grass(y: Map, x: Map, random: np.random.Generator) -> Map:
    return 0.4 + 0.6 * _smooth_noise(y.shape, 3, random)


def _water(y: Map, x: Map, random: np.random.Generator) -> Map:
    phase = 6 * _smooth_noise(y.shape, 16, random)
    return 0.6 + 0.35 * np.sin(y * (2 * math.pi / 7) + phase)


def _brick(y: Map, x: Map, random: np.random.Generator) -> Map:
    row = np.floor(y / 6)
    joint = (y % 6 < 1) | ((x + 7 * (row % 2)) % 14 < 1)
    return np.where(joint, 1.2, 0.7 + 0.25 * _smooth_noise(y.shape, 5, random)).astype(np.float32)


_TEXTURES: tuple[Callable[[Map, Map, np.random.Generator], Map], ...] = (_sky, _grass, _water, _brick)


def _inside(kind: int, y: Map, x: Map, size: float, angle: float) -> npt.NDArray[np.bool_]:
    """Returns which pixels are in a shape of class `kind` and half side `size` around the origin."""
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if kind == 0:
        return u**2 + v**2 <= size**2
    if kind == 1:
        return np.maximum(np.abs(u), np.abs(v)) <= 0.85 * size
    if kind == 2:  # three half planes
        return (v <= 0.6 * size) & (math.sqrt(3) * np.abs(u) - v <= 1.2 * size)
    radius = u**2 + v**2
    return (radius <= size**2) & (radius >= (0.45 * size) ** 2)


class SyntheticDataset:
    """Scenes that depend only on the seed and the index.

    A scene has two or three grounds of different stuff, separated by straight lines, and shapes in random colors. Later
    shapes cover earlier ones. The visible rest of a shape that is nearly hidden is void.

    Args:
        count: Number of scenes.
        seed: Seed of the scenes. Different seeds give unrelated scenes, so use different ones for training and tests.
        size: Height and width in pixels.
        shapes: Minimum and maximum number of shapes in a scene.

    Example:
        >>> scene = SyntheticDataset(10, seed=3).load(0)
        >>> scene.image.shape, scene.image.dtype
        (torch.Size([3, 128, 192]), torch.uint8)
    """

    def __init__(
        self, count: int, seed: int = 0, size: tuple[int, int] = (128, 192), shapes: tuple[int, int] = (2, 7)
    ) -> None:
        if count < 0 or min(size) < 16 or not 0 <= shapes[0] <= shapes[1]:
            raise ValueError(
                "SyntheticDataset: expected count >= 0, sides of at least 16 and shapes (minimum, maximum), "
                f"got {count}, {size} and {shapes}"
            )
        self.categories = SYNTHETIC
        self.count = count
        self.seed = seed
        self.size = size
        self.shapes = shapes

    def __len__(self) -> int:
        """Returns the number of scenes."""
        return self.count

    def load(self, index: int) -> Sample:
        """Draws scene `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0..{self.count - 1}, got {index}")
        random = np.random.default_rng((self.seed, index))
        y, x = np.indices(self.size, dtype=np.float32)
        image = np.zeros((*self.size, 3), np.float32)
        segments = np.zeros(self.size, np.int32)
        rows = self._draw_grounds(y, x, image, segments, random)
        rows += self._draw_shapes(y, x, image, segments, len(rows), random)
        image += random.normal(0, 0.02, image.shape).astype(np.float32)
        return Sample(
            image=torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1).contiguous(),
            segments=torch.from_numpy(segments),
            isthing=torch.tensor([isthing for isthing, _ in rows], dtype=torch.bool, device="cpu"),
            label=torch.tensor([label for _, label in rows], dtype=torch.int64, device="cpu"),
            crowd=torch.zeros(len(rows), dtype=torch.bool, device="cpu"),
            area=torch.from_numpy(
                np.bincount(segments.ravel(), minlength=len(rows) + 1)[1:].astype(np.int64)
            ),
            image_id=index,
            file_name=f"synthetic scene {index} of seed {self.seed}",
        )

    def _draw_grounds(
        self, y: Map, x: Map, image: Map, segments: npt.NDArray[np.int32], random: np.random.Generator
    ) -> list[tuple[bool, int]]:
        height, width = self.size
        kinds = random.permutation(len(_TEXTURES))[: random.integers(2, 4)]
        region = np.zeros(self.size, np.int32)
        for number in range(1, len(kinds)):
            angle = random.uniform(-math.pi, math.pi)
            through = random.uniform(0.3, 0.7, 2) * (height, width)
            side = (y - through[0]) * math.cos(angle) + (x - through[1]) * math.sin(angle)
            region[side > 0] = number
        for number, kind in enumerate(kinds):
            mine = region == number
            tint = np.asarray(SYNTHETIC.stuff[kind].color, np.float32) / 255 * random.uniform(0.85, 1.15, 3)
            image[mine] = (_TEXTURES[kind](y, x, random)[..., None] * tint)[mine]
            segments[mine] = number + 1
        return [(False, int(kind) + 1) for kind in kinds]

    def _draw_shapes(
        self,
        y: Map,
        x: Map,
        image: Map,
        segments: npt.NDArray[np.int32],
        before: int,
        random: np.random.Generator,
    ) -> list[tuple[bool, int]]:
        height, width = self.size
        rows, areas = [], []
        for number in range(int(random.integers(self.shapes[0], self.shapes[1] + 1))):
            kind = int(random.integers(len(SYNTHETIC.things)))
            size = min(height, width) * random.uniform(0.08, 0.25)
            centre = random.uniform(0.08, 0.92, 2) * (height, width)
            mine = _inside(kind, y - centre[0], x - centre[1], size, random.uniform(0, 2 * math.pi))
            light = 0.75 + 0.25 * (np.cos(0.5 * (x + y) / size) if number % 2 else np.ones_like(y))
            image[mine] = (light[..., None] * random.uniform(0.1, 1.0, 3))[mine]
            segments[mine] = before + number + 1
            rows.append((True, kind))
            areas.append(int(mine.sum()))
        for number, area in enumerate(areas):
            visible = segments == before + number + 1
            if visible.sum() < max(_LEAST_VISIBLE_PIXELS, _LEAST_VISIBLE_SHARE * area):
                segments[visible] = 0
        return rows
