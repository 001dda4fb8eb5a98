"""A tiny data set in the directory layout of Cityscapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CAR, PERSON, ROAD, SKY, PARKING = 26, 24, 7, 23, 9


def street(height: int = 32, width: int = 64) -> npt.NDArray[np.uint16]:
    """Returns instance ids [H, W] of sky over road, two cars, a group of persons and a parking lot.

    Cityscapes does not evaluate parking.
    """
    numbers = np.full((height, width), ROAD, np.uint16)
    numbers[: height // 2] = SKY
    numbers[height // 4 : -2, 2:14] = 1000 * CAR
    numbers[height // 4 : -2, 16:30] = 1000 * CAR + 1
    numbers[height // 4 : -2, 34:44] = PERSON
    numbers[-4:, -8:] = PARKING
    return numbers


def write_city(root: Path, names: dict[str, list[str]], split: str = "val") -> None:
    """Writes one street for each name of each city, with noise as its image."""
    for city, streets in names.items():
        for number, name in enumerate(streets):
            truth = np.roll(street(), 2 * number, axis=1)
            pixels = np.random.default_rng(number).integers(0, 256, (*truth.shape, 3), dtype=np.uint8)
            for directory, suffix, content in (
                ("leftImg8bit", "leftImg8bit", pixels),
                ("gtFine", "gtFine_instanceIds", truth),
            ):
                path = root / directory / split / city / f"{name}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
